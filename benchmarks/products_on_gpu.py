"""The steps of `benchmarks gpu --part products`: weight times one row of activations, most of the work of a token.

The candidate kernels of row_products.py are compared with those that the chat uses today, at the shapes of 7B; then the
kernels of a token are listed by time. A kind of weights whose candidates give wrong values is not timed.
"""

import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import answers_on_gpu, counted, row_products, training_on_gpu
from benchmarks.harness import NotEqual, row, take_turns, timed
from minigpt4.common.cuda_graphs import record
from minigpt4.models.llm.decoding import Decoder
from minigpt4.models.llm.quantised_layers import INT4_GROUP, Int4Linear, Int8Linear

KINDS = {"fp16": "none", "int8": "int8", "int4": "int4"}
# of the activations, as in the chat
DTYPES = {"fp16": torch.float16, "int8": torch.float16, "int4": torch.bfloat16}
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # [N, K]
OUTPUT_LAYER = (32000, 4096)  # always in float16
# bytes of different weights, more than any cache holds; and bytes that a graph reads in total: half a millisecond
READ = (3e8, 2e9)
ROUNDS, REPLAYS = 5, 10
SMALL = (((64, 128), (128, 64)), (256, 64))  # the shapes of a rehearsal
PROMPT = answers_on_gpu.PROMPT
Step = tuple[str, Callable[[], dict], int]


class Weight(NamedTuple):
    """A random weight [N, K] and the functions that multiply it: x [1, K] -> [1, N]."""

    nbytes: int
    today: Callable[[Tensor], Tensor]
    candidate: Callable[..., Tensor]  # takes x and a Config
    exact: Callable[[], Tensor]  # the weight of the candidates in float64


def draw(kind: str, rows: int, columns: int, device: torch.device) -> Weight:
    """Return a Weight [rows, columns]; with 4 bits the candidate's values differ from today's, whose groups are others."""
    linear = nn.Linear(columns, rows, bias=False, dtype=torch.float16, device=device)
    w = linear.weight.detach()
    if kind == "fp16":
        candidate = partial(row_products.wide, w, None)
        return Weight(w.nbytes, partial(F.linear, weight=w), candidate, w.double)
    if kind == "int8":
        layer = Int8Linear.of(linear)
        w, scale = layer.weight, layer.scale[:, None]
        candidate = partial(row_products.wide, w, layer.scale)
        return Weight(w.nbytes, layer.product, candidate, lambda: w.double() * scale.double())
    levels = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, device=device)
    shape = (rows, columns // INT4_GROUP)
    step, middle = (torch.randn(shape, device=device).bfloat16() for _ in range(2))
    w, scale = row_products.pack_int4(levels, step, middle)

    def exact() -> Tensor:
        numbers = levels.double().unflatten(1, (INT4_GROUP, -1)) - 8
        return (numbers * step.double()[:, None] + middle.double()[:, None]).flatten(1)

    nbytes, candidate = w.nbytes + scale.nbytes, partial(row_products.int4, w, scale)
    return Weight(nbytes, Int4Linear.of(linear).product, candidate, exact)


def activations(kind: str, columns: int, device: torch.device) -> Tensor:
    """Return random activations [1, columns] with one outlier, as large as those of an LLM."""
    x = torch.randn(1, columns, dtype=DTYPES[kind], device=device)
    x[0, 7] = 60
    return x


def errors(kind: str, rows: int, columns: int, device: torch.device) -> dict[str, float]:
    """Return {candidate: relative error of its product against float64}."""
    weight, x = draw(kind, rows, columns, device), activations(kind, columns, device)
    exact, found = x.double() @ weight.exact().T, {}
    for config in row_products.CONFIGS[kind]:
        y = weight.candidate(x, config).double()
        found[str(tuple(config))] = ((y - exact).norm() / exact.norm()).item()
    return found


def steps(args: Namespace) -> Iterator[Step]:
    """Yield (name, step, time limit in seconds); the limits add up to less than 200."""
    products = Products(args)
    for name, step, limit in (
        ("values", products.values, 20),
        ("products", products.speed, 20),
        ("kernels of a token", products.token, 25),
    ):
        for kind in KINDS:
            yield f"{name}, {kind}", partial(step, kind), limit


class Products:
    """The steps, and what they share: the kinds whose values are right, and how fast memory is copied here."""

    def __init__(self, args: Namespace):
        self.args, self.device = args, torch.device("cuda")
        self.shapes, self.output_layer = SMALL if args.rehearsal else (SHAPES, OUTPUT_LAYER)
        self.read = (5e4, 1e5) if args.rehearsal else READ
        self.right, self.copy_rate = set(), None  # bytes a second; see `speed`

    @torch.no_grad()
    def values(self, kind: str) -> dict:
        """Return a row: the candidates' largest error. Raises NotEqual if it is too large."""
        found = {f"{n}x{k}": errors(kind, n, k, self.device) for n, k in self.shapes}
        every = [error for each in found.values() for error in each.values()]
        # half a unit in the last place: what rounding the result alone can give; NaN is too large as well
        limit = torch.finfo(DTYPES[kind]).eps / 2
        is_right = all(error <= limit for error in every)
        if not (is_right or self.args.rehearsal):
            raise NotEqual(f"errors of more than {limit:.1e}: {found}")
        self.right.add(kind)
        worst = [max(each.values()) for each in found.values()]
        rows = [row(f"{kind}: largest error of the candidates", "", worst, at_most=limit)]
        return {"rows": rows, "errors": found}

    @torch.no_grad()
    def speed(self, kind: str) -> dict:
        """Return a row for each shape: the microseconds of the best candidate, beside today's and what the memory allows."""
        if kind not in self.right:
            raise NotEqual("the candidates are not right: no speed is shown")
        self.copy_rate = self.copy_rate or max(counted.copies(self.device, 2**30, 10))
        shapes = (*self.shapes, self.output_layer) if kind == "fp16" else self.shapes
        rows, found = [], {}
        for shape in shapes:
            times, nbytes = self._microseconds(kind, *shape)
            today = times.pop("today")
            best = min(times.values(), key=median)
            name = f"{kind} product {shape[0]}x{shape[1]}, beside today's"
            rows.append(row(name, "us", best, stock=today, limit=nbytes / self.copy_rate * 1e6))
            found[f"{shape[0]}x{shape[1]}"] = {"today": today, **times}
        return {"rows": rows, "us": found}

    def _microseconds(self, kind: str, rows: int, columns: int) -> tuple[dict[str, list], int]:
        """Return ({"today" or a candidate: microseconds of a product in each round}, bytes that a product reads)."""
        # enough different weights that none of them is read from a cache
        first, x = draw(kind, rows, columns, self.device), activations(kind, columns, self.device)
        count = math.ceil(self.read[0] / first.nbytes)
        weights = [first, *(draw(kind, rows, columns, self.device) for _ in range(count - 1))]
        ways = {"today": [partial(weight.today, x) for weight in weights]}
        for config in row_products.CONFIGS[kind]:
            ways[str(tuple(config))] = [partial(weight.candidate, x, config) for weight in weights]
        # one graph of many products for each way: its launch costs next to nothing
        passes = math.ceil(self.read[1] / (count * first.nbytes))
        clocks = {}
        for name, calls in ways.items():
            replay = partial(_replay, _recorded(calls * passes))
            clocks[name] = timed(replay, self.device, time.perf_counter)
        seconds = take_turns(clocks, ROUNDS, warm_up=1)
        products = REPLAYS * passes * count
        found = {name: [each / products * 1e6 for each in seconds[name]] for name in ways}
        return found, first.nbytes

    @torch.no_grad()
    def token(self, kind: str) -> dict:
        """Return the milliseconds that the kernels of a recorded token take, and the kernels by time."""
        answers = answers_on_gpu.Answers(self.args)
        answers.draw(KINDS[kind])
        llm = answers.model.llama_model
        decoder = Decoder(llm)
        past = decoder.new_past()
        positions = torch.arange(PROMPT, device=self.device)[None]
        embeds = llm.get_input_embeddings()(torch.full_like(positions, 7))
        decoder.prefill(past, embeds, positions, None)
        with decoder.steps(past, 1, PROMPT + 2) as step:
            token, place = positions.new_full((1,), 7), positions.new_full((1, 1), PROMPT)
            step(token, place, None)
            found = training_on_gpu.kernels_by_time(partial(step, token, place + 1, None))
        for name, count, ms in found["top"][:12]:
            print(f"{ms:9.3f} ms {count:5d} x {name}")
        rows = [row(f"{answers.size} {kind}: kernels of a token", "ms", [found["ms"]])]
        return {"rows": rows, "recorded": decoder.static, **found}


def _recorded(calls: list[Callable[[], Tensor]]) -> torch.cuda.CUDAGraph:
    """Return a CUDA graph of all calls; their results are dropped."""

    def products() -> None:
        for call in calls:
            call()

    return record(torch.device("cuda"), products, warm_ups=1)[0]


def _replay(graph: torch.cuda.CUDAGraph) -> None:
    for _ in range(REPLAYS):
        graph.replay()
