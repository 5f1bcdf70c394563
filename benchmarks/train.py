"""Seconds of a training step: ours beside what 2023 computes and beside transformers' BLIP-2 trained the stock way.

All ways alternate on the same weights and batches; no speed is printed unless the errors pass `parity`'s limits. `vit`,
`qformer`, `llm`: one part of the step alone. --ladder adds the ways between 2023 and ours, each with the improvements of
those before it: padded (logits at targets only, fused attention in ViT and Q-Former), packed (packed texts, their common
prefix once, chunked cross entropy), lean (lean layers, the last one only where something is predicted), and, with
--compiled, compiled (everything between the matrix products compiled).
"""

from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import baseline_2023, blip2, counted, parity, workload
from benchmarks.harness import DEVICE, DTYPE, ROUNDS, NotEqual, row, take_turns, timed
from minigpt4.common.device import resolve_device
from minigpt4.models.base_model import DTYPES

HELP = "a training step beside that of 2023 and of transformers' BLIP-2; --ladder: one lever after the other"
# {(size, stage): how many times faster than 2023 a step has to be}
GATES = {
    ("toy", 1): 1.05,
    ("toy", 2): 1.4,
    ("slice", 1): 1.0,
    ("slice", 2): 1.0,
    ("7b", 1): 1.6,
    ("7b", 2): 1.8,
}
BATCH = {1: 16, 2: 12}
# sizes of which a float32 copy fits into memory as well
WITH_FLOAT32 = [size for size in workload.SIZES if size not in ("7b", "13b")]
Ways = dict[str, Callable[[], Tensor]]


OPTIONS = {
    "--size": {"choices": list(workload.SIZES), "default": "toy"},
    "--stage": {"type": int, "choices": (1, 2), "help": "(default: both)"},
    "--batch": {"type": int, "help": f"(default: stage 1 {BATCH[1]}, stage 2 {BATCH[2]})"},
    "--device": DEVICE,
    "--dtype": DTYPE | {"help": "(default: fp16 on a GPU, else bf16; toy fp32)"},
    "--rounds": ROUNDS,
    "--ladder": {"action": "store_true", "help": "every way, not only the fastest"},
    "--compiled": {"action": "store_true", "help": "also with model.compile (half a minute more)"},
}


def run(args: Namespace) -> dict:
    """Measure the stages; return their rows and the errors of `parity`."""
    device = resolve_device(args.device)
    default_on_cpu = "fp32" if args.size in ("tiny", "toy") else "bf16"
    dtype = args.dtype or ("fp16" if device.type == "cuda" else default_on_cpu)
    torch.set_float32_matmul_precision("highest")
    ceiling = matmul_flops(device, dtype)
    print(
        f"{args.size}, {dtype} on {device}; matrix product {ceiling / 1e12:.3g} TFLOP/s; rounds: {args.rounds}"
    )
    rows, errors = [], {}
    for stage in [args.stage] if args.stage else list(workload.STAGES):
        stage_rows, errors[stage] = measure(args, stage, device, dtype, ceiling)
        rows += stage_rows
    return {
        "rows": rows,
        "size": args.size,
        "dtype": dtype,
        "matmul_flops": ceiling,
        "errors": errors,
    }


def measure(
    args: Namespace, stage: int, device: torch.device, dtype: str, ceiling: float
) -> tuple[list[dict], dict | None]:
    """Return a stage's rows, one for each of our ways, and the errors.

    `ceiling`: FLOPs a second at best. Raises NotEqual where an error is too large.
    """
    half = dtype
    if dtype == "fp32":
        half = "bf16" if device.type == "cpu" else "fp16"
    model, errors = workload.random_model(args.size, DTYPES[half], device, stage), None
    if args.compiled:
        parity.compile_vision(model)
    batch_size = args.batch or BATCH[stage]
    # Parity first. For 7B and 13B, whose float32 copies do not fit, `slice` stands in: its layers are those of 7B.
    if args.size in WITH_FLOAT32:
        checked = workload.batches(model, stage, min(batch_size, 4), 3, seed=workload.SEED + 1)
        wide = workload.in_float32(model)
        if args.compiled:
            parity.compile_vision(wide)
        exact = parity.exact_steps(model, checked)
        errors = parity.of_models(exact, wide, model, checked, args.compiled)
        parity.print_table({stage: errors}, "half")
        if not parity.verdict(errors):
            raise NotEqual("the errors are too large")
        model = wide if dtype == "fp32" else model
        del wide
    batches = workload.batches(model, stage, batch_size, 2)
    ours = ["padded", "packed", "lean"] if args.ladder else ["lean"]
    if args.compiled:
        ours.append("compiled")
    seconds = seconds_of(model, batches, ["2023", "transformers", *ours], args.rounds)
    useful = sum(workload.useful_flops(model, batch) for batch in batches) / len(batches)
    old, stock = seconds.pop("2023"), seconds.pop("transformers")
    rows = []
    judged = ours[-1]  # the fastest way; the others have no gate
    for way, values in seconds.items():
        name = f"stage {stage}: step, {args.size} {dtype}{'' if way == 'lean' else f', {way}'}"
        gate = GATES.get((args.size, stage)) if way == judged else None
        rows.append(row(name, "s", values, old, stock, limit=useful / ceiling, at_least=gate))
    return rows, errors


def seconds_of(
    model: torch.nn.Module, batches: list[dict], ways: list[str], rounds: int
) -> dict[str, list[float]]:
    """Return {way: [seconds of a step in each round]}; on a CPU, seconds of CPU time."""
    stock = blip2.blip2(model)

    def steps(way):
        for batch in batches:
            model.zero_grad()
            parity.loss_of(model, stock, way, batch).backward()

    def seconds(way):
        return timed(partial(steps, way), model.device)() / len(batches)

    results = take_turns({way: partial(seconds, way) for way in ways}, rounds, warm_up=1)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return results


def matmul_flops(device: torch.device, dtype: str) -> float:
    """Return the FLOPs a second of a large product of square matrices, the best of five, timed by the same clock as steps."""
    return max(counted.matmul(device, dtype, counted.SIDE[device.type], 5, None)[0])


class Part:
    """A command that measures one part of the step; `ways` takes (model, batch) and returns {way: function giving a tensor}.

    `flops`: takes (model, batch) and returns the FLOPs needed at least; by default those that ours executes.
    """

    OPTIONS = {
        "--size": {
            "choices": WITH_FLOAT32,
            "default": "toy",
            "help": "7b-thin: full width, few layers",
        },
        "--stage": {
            "type": int,
            "choices": (1, 2),
            "default": 1,
            "help": "whose texts (default: %(default)s)",
        },
        "--batch": {"type": int, "default": 8},
        "--device": DEVICE,
        "--dtype": DTYPE,
        "--rounds": ROUNDS,
    }

    def __init__(
        self, title: str, ways: Callable[..., Ways], flops: Callable[..., float] | None = None
    ):
        self.HELP, self.title = (f"{title}, beside that of 2023 and of transformers", title)
        self.ways, self.flops = ways, flops

    def run(self, args: Namespace) -> dict:
        """Return the rows and errors of all ways. Raises NotEqual where ours is too far from 2023."""
        device = resolve_device(args.device)
        half_name = "fp16" if device.type == "cuda" else "bf16"
        dtype = args.dtype or half_name
        half_dtype = DTYPES[half_name if dtype == "fp32" else dtype]
        half = workload.random_model(args.size, half_dtype, device, args.stage)
        wide = workload.in_float32(half)
        batch = workload.batches(half, args.stage, args.batch, 1)[0]
        wide_ways, half_ways = self.ways(wide, batch), self.ways(half, batch)
        # errors relative to 2023 in float64; no speed is shown if they are too large
        in_float64 = batch | {"image": batch["image"].double()}
        exact, errors = self.ways(workload.in_float64(half), in_float64)["2023"](), {}
        distance = lambda way: ((way().double() - exact).norm() / exact.norm()).item()  # noqa: E731
        for way in wide_ways:
            errors[way] = {"fp32": distance(wide_ways[way]), "half": distance(half_ways[way])}
            print(
                f"{way:<16} error in fp32 {errors[way]['fp32']:.1e}, in half precision {errors[way]['half']:.2e}"
            )
        limits = {kind: parity.AS_2023 * error for kind, error in errors["2023"].items()}
        limits["fp32"] = max(limits["fp32"], parity.FLOAT32_LIMIT)
        if any(errors["ours"][kind] > limit for kind, limit in limits.items()):
            raise NotEqual("the errors are too large")
        model, ways = (wide, wide_ways) if dtype == "fp32" else (half, half_ways)
        seconds = take_turns(
            {way: timed(each, device) for way, each in ways.items()}, args.rounds, warm_up=1
        )
        flops = self.flops(model, batch) if self.flops else workload.count_flops(ways["ours"])
        limit = flops / matmul_flops(device, dtype)
        name = f"{self.title}, {args.size} {dtype}, batch {args.batch}, stage {args.stage}"
        ours, old, stock = (seconds.get(way) for way in ("ours", "2023", "transformers"))
        rows = [row(name, "s", ours, old, stock, limit=limit)]
        return {"rows": rows, "errors": errors, "seed": workload.SEED}


def vit_ways(model: nn.Module, batch: dict) -> Ways:
    """Return ways to compute the image features that the Q-Former reads."""
    stock = blip2.blip2(model).vision_model

    def features():
        return model.ln_vision(model.visual_encoder(batch["image"]))

    def stock_features():
        return stock(pixel_values=batch["image"]).last_hidden_state

    return {
        "2023": partial(_forward, model, features, as_2023=True),
        "ours": partial(_forward, model, features),
        "transformers": partial(_forward, model, stock_features),
    }


def qformer_ways(model: nn.Module, batch: dict) -> Ways:
    """Return ways to compute the Q-Former's outputs; transformers' is ours, which consists of its layers."""
    features = vit_ways(model, batch)["ours"]()
    query = partial(model.Qformer, model.query_tokens, features)
    return {
        "2023": partial(_forward, model, query, as_2023=True),
        "ours": partial(_forward, model, query),
    }


@torch.no_grad()
def _forward(model, function, as_2023=False):
    with model.maybe_autocast(), baseline_2023.plain_vision(model) if as_2023 else nullcontext():
        return function()


def llm_ways(model: nn.Module, batch: dict) -> Ways:
    """Return ways to compute the gradient of the loss with respect to the image vectors that the LLM reads."""
    with torch.no_grad():
        embeds = workload.image_embeds(model, batch["image"]).requires_grad_()

    def gradient(loss):
        embeds.grad = None
        with workload.given_images(model, embeds):
            (1024 * loss()).backward()  # loss scaling, see parity.steps
        return embeds.grad / 1024

    def stock():
        inputs = workload.llm_inputs(model, batch)
        with blip2.stock_attention(model.llama_model), model.maybe_autocast():
            return model.llama_model(**inputs, use_cache=False).loss

    losses = {"2023": partial(baseline_2023.loss, model, batch), "transformers": stock}
    losses["ours"] = lambda: model(batch)["loss"]
    return {way: partial(gradient, loss) for way, loss in losses.items()}


def llm_flops(model: nn.Module, batch: dict) -> float:
    """Return the FLOPs that the LLM cannot do without: forward, and backward to the image vectors."""
    with torch.no_grad():
        vision = workload.count_flops(lambda: workload.image_embeds(model, batch["image"]))
    projection = (
        2 * len(batch["image"]) * model.query_tokens.shape[1] * model.llama_proj.weight.numel()
    )
    return workload.useful_flops(model, batch) - vision - projection


VIT = Part("the ViT's forward pass", vit_ways)
QFORMER = Part("the Q-Former's forward pass", qformer_ways)
LLM = Part("the LLM forward and backward", llm_ways, llm_flops)
