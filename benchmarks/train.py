"""Seconds of a training step, ours beside what 2023 computes and beside transformers' BLIP-2 trained the stock way.

One process, the same random weights and batches, all ways taking turns. No speed is printed unless `parity` passes on
the same weights.
"""

import time
from functools import partial
from statistics import median

from benchmarks import machine, parity, workload
from minigpt4.common.device import resolve_device

HELP = "a training step beside that of 2023 and of transformers' BLIP-2; --ladder: one lever after the other"
LADDER = {  # way -> what it adds to the one before
    "2023": "padded, all logits, plain attention",
    "transformers": "BLIP-2 of transformers, the stock way",
    "padded": "ours: logits at texts, fused attention in the vision parts",
    "packed": "+ packed texts, their common beginning once, cross entropy in pieces",
    "lean": "+ lean layers, the last one where something is predicted",
    "compiled": "+ what lies between matrix products compiled",
}
GATES = {("toy", 1): 1.05, ("toy", 2): 1.4, ("slice", 1): 1.0, ("slice", 2): 1.0, ("7b", 1): 1.6, ("7b", 2): 1.8}
BATCH = {1: 16, 2: 12}


def add_arguments(parser):
    parser.add_argument("--size", choices=list(workload.SIZES), default="toy")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="(default: both)")
    parser.add_argument("--batch", type=int, help=f"(default: stage 1 {BATCH[1]}, stage 2 {BATCH[2]})")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), help="(default: fp16 on a GPU, else bf16; toy fp32)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ladder", action="store_true", help="every way, not only 2023, transformers and the fastest")
    parser.add_argument("--compiled", action="store_true", help="also with model.compile (half a minute more)")


def run(args):
    """Measure, print the tables, return the figures."""
    import torch

    device = resolve_device(args.device)
    on_cpu = "fp32" if args.size in ("tiny", "toy") else "bf16"
    dtype = args.dtype or ("fp16" if device.type == "cuda" else on_cpu)
    torch.set_float32_matmul_precision("highest")
    ceiling = matmul_flops(device, dtype)
    print(f"{args.size}, {dtype} on {device}; matrix product {ceiling / 1e12:.3g} TFLOP/s; median of {args.rounds}")
    ways = [way for way in LADDER if args.ladder or way in ("2023", "transformers", "lean", "compiled")]
    if not args.compiled:
        ways.remove("compiled")
    stages = {}
    for stage in [args.stage] if args.stage else list(workload.STAGES):
        stages[stage] = measure(args, stage, device, dtype, ways, ceiling)
        print_table(stage, stages[stage], GATES.get((args.size, stage)))
    passed = all(stage["passed"] for stage in stages.values())
    figures = {"size": args.size, "dtype": dtype, "seed": workload.SEED, "matmul_flops": ceiling, "stages": stages}
    return {**figures, "passed": passed, **machine.description("transformers", "timm")}


def measure(args, stage, device, dtype, ways, ceiling):
    """Return errors and, if they are small enough, seconds and ratios of one stage."""
    from minigpt4.models.base_model import DTYPES

    half = dtype if dtype != "fp32" else "bf16" if device.type == "cpu" else "fp16"
    model = workload.random_model(args.size, DTYPES[half], device, stage)
    if args.compiled:
        parity.compile_vision(model)
    batch_size = args.batch or BATCH[stage]
    figures = {"batch": batch_size, "errors": None, "seconds": None, "passed": True}
    if args.size != "7b":  # float32 weights beside the others do not fit everywhere; `slice` has the same layers
        few = workload.batches(model, stage, min(batch_size, 4), 3, seed=workload.SEED + 1)
        wide = workload.in_float32(model)
        if args.compiled:
            parity.compile_vision(wide)
        figures["errors"] = parity.of_models(parity.steps(wide, "2023", few), wide, model, few, args.compiled)
        figures["passed"] = parity.verdict(figures["errors"])
        model = wide if dtype == "fp32" else model
        del wide
        if not figures["passed"]:
            return figures
    batches = workload.batches(model, stage, batch_size, 2)
    figures["seconds"] = seconds(model, batches, ways, args.rounds, device)
    useful = sum(workload.useful_flops(model, batch) for batch in batches) / len(batches)
    figures |= compared(figures["seconds"], useful, ceiling)
    figures["passed"] = figures["ratio"]["lean"] >= GATES.get((args.size, stage), 0)
    return figures


def seconds(model, batches, ways, rounds, device):
    """Return {way: [seconds of a step]}, of the process's CPU on a CPU; each way leads every other round."""
    import torch

    from benchmarks.blip2 import blip2

    stock = blip2(model)

    def steps(way):
        for batch in batches:
            model.zero_grad()
            parity.loss_of(model, stock, way, batch).backward()

    found = take_turns({way: partial(steps, way) for way in ways}, rounds, device)
    torch.cuda.empty_cache() if device.type == "cuda" else None
    return {way: [value / len(batches) for value in values] for way, values in found.items()}


def take_turns(ways, rounds, device):
    """Return {way: [seconds of a call in each round]} of {way: function}; each way leads every other round."""
    found = {way: [] for way in ways}
    for number in range(rounds + 1):  # the first round warms up
        for way in list(ways)[:: 1 if number % 2 else -1]:
            start = now(device)
            ways[way]()
            found[way].append(now(device) - start)
    return {way: values[1:] for way, values in found.items()}


def compared(seconds, useful, ceiling):
    """Return {"ratio" to 2023, "share of limit"} of the ways: `useful` FLOPs, at `ceiling` FLOPs a second at best."""
    times = {way: median(values) for way, values in seconds.items()}
    return {
        "ratio": {way: times["2023"] / value for way, value in times.items()},
        "share of limit": {way: useful / ceiling / value for way, value in times.items()},
    }


def now(device):
    if device.type == "cpu":
        return time.process_time()
    import torch

    getattr(torch, device.type).synchronize()
    return time.perf_counter()


def matmul_flops(device, dtype):
    """Return the FLOPs a second of a large product of square matrices of random numbers, the best of five."""
    import torch

    from minigpt4.models.base_model import DTYPES

    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
    times = []
    for _ in range(6):
        start = now(device)
        for _ in range(5):
            a @ b
        times.append((now(device) - start) / 5)
    return 2 * size**3 / min(times[1:])


def print_table(stage, figures, gate):
    print(f"\nstage {stage}, batch {figures['batch']}")
    if figures["errors"]:
        parity.print_table({stage: figures["errors"]}, "half")
    if not figures["seconds"]:
        return print("FAIL: the errors are too large, no speed is shown")
    print(f"{'':<76}{'seconds a step':>28}{'x 2023':>8}{'of limit':>10}")
    for way, values in figures["seconds"].items():
        cell = f"{median(values):.4g} [{min(values):.4g} .. {max(values):.4g}]"
        ratio, share = figures["ratio"][way], figures["share of limit"][way]
        print(f"{f'{way}: {LADDER[way]}':<76}{cell:>28}{ratio:>8.2f}{share:>10.1%}")
    if gate:
        print(f"{'PASS' if figures['passed'] else 'FAIL'}: at least {gate} times 2023")
