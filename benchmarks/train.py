"""Seconds of a training step, ours beside what 2023 computes and beside transformers' BLIP-2 trained the stock way.

One process, the same random weights and batches, all ways taking turns. No speed is printed unless `parity` passes on
the same weights. With --ladder also the ways between: padded (logits at texts, fused attention in the vision parts),
packed (packed texts, their common beginning once, cross entropy in pieces), lean (lean layers, the last one only where
something is predicted), compiled (what lies between matrix products compiled).
"""

from argparse import Namespace
from functools import partial

import torch

from benchmarks import limits, parity, workload
from benchmarks.blip2 import blip2
from benchmarks.harness import DEVICE, DTYPE, ROUNDS, NotEqual, row, take_turns, timed
from minigpt4.common.device import resolve_device
from minigpt4.models.base_model import DTYPES

HELP = "a training step beside that of 2023 and of transformers' BLIP-2; --ladder: one lever after the other"
# (size, stage) -> times faster than 2023
GATES = {("toy", 1): 1.05, ("toy", 2): 1.4, ("slice", 1): 1.0, ("slice", 2): 1.0, ("7b", 1): 1.6, ("7b", 2): 1.8}
BATCH = {1: 16, 2: 12}


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
    on_cpu = "fp32" if args.size in ("tiny", "toy") else "bf16"
    dtype = args.dtype or ("fp16" if device.type == "cuda" else on_cpu)
    torch.set_float32_matmul_precision("highest")
    ceiling = matmul_flops(device, dtype)
    print(f"{args.size}, {dtype} on {device}; matrix product {ceiling / 1e12:.3g} TFLOP/s; rounds: {args.rounds}")
    rows, errors = [], {}
    for stage in [args.stage] if args.stage else list(workload.STAGES):
        stage_rows, errors[stage] = measure(args, stage, device, dtype, ceiling)
        rows += stage_rows
    return {"rows": rows, "size": args.size, "dtype": dtype, "matmul_flops": ceiling, "errors": errors}


def measure(
    args: Namespace, stage: int, device: torch.device, dtype: str, ceiling: float
) -> tuple[list[dict], dict | None]:
    """Return a stage's rows, one for each of our ways, and the errors.

    `ceiling`: FLOPs a second at best. Raises NotEqual where an error is too large.
    """
    half = dtype if dtype != "fp32" else "bf16" if device.type == "cpu" else "fp16"
    model, errors = workload.random_model(args.size, DTYPES[half], device, stage), None
    if args.compiled:
        parity.compile_vision(model)
    batch_size = args.batch or BATCH[stage]
    # float32 weights beside those of 7B do not fit everywhere; `slice` has the same layers
    if args.size not in ("7b", "13b"):
        few = workload.batches(model, stage, min(batch_size, 4), 3, seed=workload.SEED + 1)
        wide = workload.in_float32(model)
        if args.compiled:
            parity.compile_vision(wide)
        errors = parity.of_models(parity.steps(wide, "2023", few), wide, model, few, args.compiled)
        parity.print_table({stage: errors}, "half")
        if not parity.verdict(errors):
            raise NotEqual("the errors are too large")
        model = wide if dtype == "fp32" else model
        del wide
    # the same batches for all ways, which take turns
    batches = workload.batches(model, stage, batch_size, 2)
    ours = ["padded", "packed", "lean"] if args.ladder else ["lean"]
    seconds = seconds_of(model, batches, ["2023", "transformers", *ours, *["compiled"] * args.compiled], args.rounds)
    useful = sum(workload.useful_flops(model, batch) for batch in batches) / len(batches)
    old, stock, rows = seconds.pop("2023"), seconds.pop("transformers"), []
    for way, values in seconds.items():
        name = f"stage {stage}: step, {args.size} {dtype}{f', {way}' if way != 'lean' else ''}"
        gate = GATES.get((args.size, stage)) if way == "lean" else None
        rows.append(row(name, "s", values, old, stock, limit=useful / ceiling, at_least=gate))
    return rows, errors


def seconds_of(model: torch.nn.Module, batches: list[dict], ways: list[str], rounds: int) -> dict[str, list[float]]:
    """Return {way: [seconds of a step in each round]}, of the process's CPU on a CPU."""
    stock = blip2(model)

    def steps(way):
        for batch in batches:
            model.zero_grad()
            parity.loss_of(model, stock, way, batch).backward()

    results = take_turns({way: timed(partial(steps, way), model.device) for way in ways}, rounds, warm_up=1)
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    return {way: [value / len(batches) for value in values] for way, values in results.items()}


def matmul_flops(device: torch.device, dtype: str) -> float:
    """Return the FLOPs a second of a large product of square matrices, the best of five, by the clock of the steps."""
    return max(limits.matmul(device, dtype, limits.SIDE[device.type], 5, None)[0])
