"""Memory and FLOPs of a training step at real size, counted on tensors without values; and the limits of this machine.

Counting needs no weights, no clock and no GPU. The 2023 step is counted beside ours, and compared with the published logs
of the 2023 release. The limits are measured: matrix products, and copying within memory, the best of the rounds.
"""

import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import nn

from benchmarks import baseline_2023, workload
from benchmarks.harness import DEVICE, QUICK, ROUNDS, Clock, Command, row, take_turns, timed
from benchmarks.workload import OFFICIAL_BATCH, V2_BATCH, V2_TOKENS, meta_model
from minigpt4.common.device import resolve_device
from minigpt4.models.base_model import DTYPES
from minigpt4.models.memory import OUTSIDE, Cost, count_step

# {stage: (batch size, "max mem" in MiB)}. Source: the logs of the 2023 release
LOG = {1: (16, 22193), 2: (12, 36093)}
LOG_TOLERANCE = 0.07
# Tokens before and after the image in the longest prompt of 2023 (the logs hold a running maximum). Counted by hand.
LONGEST_PROMPT = (8, 23)
# {stage: GiB at most} at 7B, in half precision, without activation checkpointing
GATES = {1: 24.5, 2: 21.5}
FLOPS_LIMIT = 1.02  # executed / useful
# Kept for backward by 7B per token and layer: input, q, k, v, attention output, residual; gate and up of the MLP.
FLOOR_KB = (6 * 4096 + 2 * 11008) * 2 / 1000  # half precision
SIDE = {"cpu": 1024, "cuda": 8192, "mps": 4096}  # of the square matrices
COPIED = {"cpu": 2**28, "cuda": 2**32, "mps": 2**30}  # bytes
CARDS = (12, 16, 24, 48, 80)  # GB
KINDS = ("none", "int8", "nf4")
Loss = Callable[[dict], torch.Tensor]


def count_memory(args: Namespace) -> dict:
    """Return rows of all sizes and kinds of quantization, and the largest batch that fits on each card."""
    sizes, kinds = (["7b"], ["none"]) if args.quick else (["7b", "13b"], KINDS)
    rows = [log_row(stage) for stage in LOG]
    for size, stage in product(sizes, OFFICIAL_BATCH):
        rows += memory_rows(size, stage, kinds)
    for kind in kinds:
        rows += v2_rows(kind)
    return {"rows": rows, "cards": {} if args.quick else cards(sizes)}


def count_step_flops(args: Namespace) -> dict:
    """Return rows of FLOPs. Tensors have no values here, so a step that reads one back from the device raises an error."""
    sizes = ["7b"] if args.quick else ["7b", "13b"]
    return {"rows": [flops_row(size, stage) for size, stage in product(sizes, OFFICIAL_BATCH)]}


def log_row(stage: int) -> dict:
    """Return the row that compares what is counted for the 2023 step with its log: the relative error."""
    (batch_size, logged), counted = LOG[stage], baseline(stage)
    print(
        f"stage {stage} as 2023, batch {batch_size}: counted {counted:.0f} MiB, in the log {logged} MiB"
    )
    name, error = f"stage {stage}: count of 2023's step beside its log", abs(counted / logged - 1)
    return row(name, "", [error], at_most=LOG_TOLERANCE)


def baseline(stage: int) -> float:
    """Return the peak in MiB of the 2023 step with the longest text and prompt that a run meets."""
    model, batch = meta_model("7b", stage, LOG[stage][0], prompt=LONGEST_PROMPT)
    batch["text_input"][0] = "a" * workload.STAGES[stage][3]
    return peak_of_2023(model, batch) / 2**20


def peak_of_2023(model: nn.Module, batch: dict) -> int:
    """Return the peak in bytes of a step as 2023 computes it."""
    # 2023 keeps rotary cosines and sines in float32 in each layer
    tables = model.llama_model.config.num_hidden_layers * 2 * 2048 * 128 * 4
    return cost(model, batch, partial(baseline_2023.loss, model)).peak + tables


def memory_rows(size: str, stage: int, kinds: list[str]) -> list[dict]:
    """Return the rows of a size and stage at the official batch: kinds of quantization x activation checkpointing."""
    batch_size, rows = OFFICIAL_BATCH[stage], []
    for kind, checkpointing in product(kinds, (False, True)):
        model, batch = meta_model(size, stage, batch_size, kind, checkpointing)
        counted = cost(model, batch, loss_of(model))
        is_plain = kind == "none" and not checkpointing
        name = f"stage {stage}: {size} peak, batch {batch_size}"
        name += f", {kind}" * (kind != "none") + ", checkpointing" * checkpointing
        old = [peak_of_2023(*meta_model(size, stage, batch_size)) / 2**30] if is_plain else None
        gate = GATES[stage] if is_plain and size == "7b" else None
        peak, weights = counted.peak / 2**30, counted.weights / 2**30
        rows.append(row(name, "GiB", [peak], old, limit=weights, at_most=gate))
        if gate:
            kept = kb_per_token_and_layer(model, batch, counted)
            rows.append(row(f"stage {stage}: kept a token and layer", "kB", [kept], limit=FLOOR_KB))
    return rows


def v2_rows(kind: str) -> list[dict]:
    """Return the rows of MiniGPT-v2's finetuning with LoRA: its peak, and the kB kept per token for backward."""
    rows = []
    one_text, whole_batch = full_texts(V2_TOKENS, 1), full_texts(V2_TOKENS, V2_BATCH)
    for checkpointing in (False, True):
        model = workload.meta_model_v2(kind, checkpointing)
        one, whole = (cost(model, batch, loss_of(model)) for batch in (one_text, whole_batch))
        # the difference of two batch sizes leaves out what is kept once, whatever the batch
        added = num_tokens(model, whole_batch) - num_tokens(model, one_text)
        kept = (whole.held - one.held) / added / 1000
        name = f"MiniGPT-v2: 7b{', checkpointing' * checkpointing}{f', {kind}' * (kind != 'none')}"
        peak = [whole.peak / 2**30]
        rows.append(row(f"{name}: peak, batch {V2_BATCH}", "GiB", peak, limit=one.weights / 2**30))
        rows.append(row(f"{name}: kept a token", "kB", [kept]))
    return rows


def full_texts(num_tokens: int, batch_size: int) -> dict:
    """Return a batch of texts of `num_tokens` tokens each."""
    return {"text_input": ["a" * num_tokens] * batch_size}


def flops_row(size: str, stage: int) -> dict:
    """Return the row of the matrix products that a step executes, in TFLOP."""
    tflop = {}
    for way in ("2023", "ours"):
        with workload.without_weights(size, stage) as (model, batch):
            loss = partial(baseline_2023.loss, model) if way == "2023" else loss_of(model)
            tflop[way] = [workload.count_flops(lambda: loss(batch).backward()) / 1e12]  # noqa: B023
            useful = workload.useful_flops(model, batch) / 1e12
    name = f"stage {stage}: {size} step, batch {OFFICIAL_BATCH[stage]}, executed"
    return row(
        name, "TFLOP", tflop["ours"], tflop["2023"], limit=useful, at_most=FLOPS_LIMIT * useful
    )


def cards(sizes: list[str]) -> dict[str, dict[int, int]]:
    """Print and return {case: {GB of a card: largest batch, up to the official one}}, with texts of full length."""
    table = {}
    print("\nlargest batch (of the official one) on a card of .. GB, texts of full length")
    print(f"{'':<32}" + "".join(f"{card:>8}" for card in CARDS))
    cases = {"7b MiniGPT-v2": (V2_BATCH, V2_TOKENS, workload.meta_model_v2)}
    for size, stage in product(sizes, OFFICIAL_BATCH):
        make = partial(stage_model, size, stage)
        cases[f"{size} stage {stage}"] = (OFFICIAL_BATCH[stage], workload.STAGES[stage][3], make)
    for (case, (official, length, make)), kind, checkpointing in product(
        cases.items(), KINDS, (False, True)
    ):
        peaks = []
        for batch_size in (1, official):
            model = make(kind, checkpointing)
            peaks.append(cost(model, full_texts(length, batch_size), loss_of(model)).peak + OUTSIDE)
        # the peak is linear in the batch size
        per_sample = (peaks[1] - peaks[0]) / (official - 1)
        name = f"{case} {kind}{' checkpointing' * checkpointing}"
        table[name] = {}
        for card in CARDS:
            largest = int(1 + (card * 2**30 - peaks[0]) // per_sample)
            table[name][card] = max(0, min(official, largest))
        print(f"{name:<32}" + "".join(f"{batch or '-':>8}" for batch in table[name].values()))
    return table


def stage_model(size: str, stage: int, kind: str, checkpointing: bool) -> nn.Module:
    """Return the model that workload.meta_model makes for a stage."""
    return meta_model(size, stage, 1, kind, checkpointing)[0]


def loss_of(model: nn.Module) -> Loss:
    """Return the function that computes our loss of a batch."""
    return lambda samples: model(samples)["loss"]


def cost(model: nn.Module, batch: dict, loss: Loss) -> Cost:
    """Return the Cost of a step with this loss on a GPU."""
    return count_step(model, batch, torch.device("cuda"), loss)


def kb_per_token_and_layer(model: nn.Module, batch: dict, counted: Cost) -> float:
    """Return the kB that a step of Cost `counted` keeps for backward per token and layer, weights aside."""
    num_layers = model.llama_model.config.num_hidden_layers
    return (counted.held - counted.weights) / num_tokens(model, batch) / num_layers / 1000


def num_tokens(model: nn.Module, batch: dict) -> int:
    """Return the number of tokens of a batch without padding: BOS, prompt, image, and the text but for its last token."""
    return sum(workload.lengths(model, batch))


def measure_limits(args: Namespace) -> dict:
    """Measure; return rows of rates and of what they allow a model at most, and the errors of the products."""
    device = resolve_device(args.device)
    side, size = (256, 2**24) if args.quick else (SIDE[device.type], COPIED[device.type])
    rates, errors = {}, {}
    rows = []
    for dtype in ("fp32", "bf16", "fp16"):
        rates[dtype], errors[dtype] = matmul(device, dtype, side, args.rounds, time.perf_counter)
        name = f"{dtype} product of {side} x {side}, error {errors[dtype]:.1e}"
        rows.append(row(name, "TFLOP/s", [rate / 1e12 for rate in rates[dtype]]))
    copied = copies(device, size, args.rounds)
    rows.append(row("copy within memory", "GB/s", [rate / 1e9 for rate in copied]))
    half = max(rates["fp16" if device.type == "cuda" else "bf16"])
    rows += of_model("tiny" if args.quick else "7b", half, max(copied))
    return {"rows": rows, "errors": errors, "device": str(device)}


def seconds(
    device: torch.device, call: Callable, rounds: int, clock: Clock | None = time.perf_counter
) -> list[float]:
    """Return the seconds of each of `rounds` calls, after one to warm up."""
    return take_turns({"": timed(call, device, clock)}, rounds, warm_up=1)[""]


def matmul(
    device: torch.device, dtype: str, side: int, rounds: int, clock: Clock | None
) -> tuple[list[float], float]:
    """Return (FLOP/s of each round, relative error of the product against float64)."""
    generator = torch.Generator().manual_seed(workload.SEED)
    a, b = (
        torch.randn(side, side, generator=generator).to(DTYPES[dtype]).to(device) for _ in range(2)
    )
    rates = [2 * side**3 / each for each in seconds(device, lambda: a @ b, rounds, clock)]
    # 64 rows of the product suffice for its error
    exact, found = a[:64].cpu().double() @ b.cpu().double(), (a @ b)[:64].cpu().double()
    return rates, ((found - exact).norm() / exact.norm()).item()


def copies(device: torch.device, size: int, rounds: int) -> list[float]:
    """Return the bytes read and written per second, in each round, by copying within the device's memory."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return [2 * size / each for each in seconds(device, lambda: target.copy_(source), rounds)]


def of_model(size: str, flops: float, copied: float) -> list[dict]:
    """Return rows of what these rates (FLOP/s, bytes/s) allow a model of `size` at most."""
    model, _ = meta_model(size, 1, 1)
    llm = model.llama_model
    # each token of an answer reads all weights but the embedding table
    read = sum(p.nbytes for p in llm.parameters()) - llm.get_input_embeddings().weight.nbytes
    limits = {}
    for stage, batch_size in OFFICIAL_BATCH.items():
        with workload.without_weights(size, stage) as (counted, batch):
            useful = workload.useful_flops(counted, batch) / batch_size
        limits[f"stage {stage}: samples"] = flops / useful
    limits["tokens of one answer"] = copied / read
    return [row(f"limit of {size}, {name}", "1/s", [value]) for name, value in limits.items()]


MEMORY = Command(
    "memory of a training step at real size, counted; the 2023 baseline beside the published log",
    {"--quick": QUICK | {"help": "7B in half precision alone, and no table of cards"}},
    count_memory,
)
FLOPS = Command(
    "FLOPs of a training step at real size, counted, beside what it cannot do without",
    {"--quick": QUICK | {"help": "7B alone"}},
    count_step_flops,
)
LIMITS = Command(
    "matrix products and memory of this machine, and the limits that follow for 7B",
    {"--device": DEVICE, "--rounds": ROUNDS, "--quick": QUICK},
    measure_limits,
)
