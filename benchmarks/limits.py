"""What this machine can do at best, and what follows for training and answering: the denominators of the other tables.

Measured: square matrix products of random numbers (with their error against float64), copying within memory, on a GPU
also copying to it and starting kernels, and reading a file that lies in memory. The best of the rounds is the limit.
"""

import tempfile
import time
from pathlib import Path

from benchmarks import machine, memory, workload
from minigpt4.common.device import resolve_device

HELP = "matrix products, memory and start-up reads of this machine, and the limits that follow for 7B"
SIDE = {"cpu": 1024, "cuda": 8192, "mps": 4096}  # of a matrix; quick: 256
COPIED = {"cpu": 2**28, "cuda": 2**32, "mps": 2**30}  # bytes; quick: 2**24


def add_arguments(parser):
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, measures nothing")


def run(args):
    """Measure, print the tables, return the figures."""
    device = resolve_device(args.device)
    side, size = (256, 2**24) if args.quick else (SIDE[device.type], COPIED[device.type])
    found = {"matmul": {}, "error": {}}
    for dtype in ("fp32", "bf16", "fp16"):
        rates, error = matmul(device, dtype, side, args.rounds)
        found["matmul"][dtype], found["error"][dtype] = rates, error
        print_row(f"{dtype} product of {side} x {side}", rates, 1e12, f"TFLOP/s, error {error:.1e}")
    for name, rates in copies(device, size, args.rounds).items():
        found[name] = rates
        print_row(name, rates, 1e9, "GB/s")
    found["file in memory"] = read_file(size, args.rounds)
    print_row("file in memory", found["file in memory"], 1e9, "GB/s")
    if device.type == "cuda":
        found["kernels"] = kernels(device, args.rounds)
        print_row("kernels started one after the other", found["kernels"], 1e6, "million/s")
    limits = of_7b(found, device, "tiny" if args.quick else "7b")
    for name, value in limits.items():
        print(f"limit of {name:<40}{value:>12.4g}")
    figures = {"device": str(device), "measured": found, "limits": limits, "quick": args.quick, "passed": True}
    return {**figures, **machine.description()}


def timed(device, function, rounds):
    """Return the seconds of `rounds` calls; one call before them warms up."""
    import torch

    wait = getattr(torch, device.type).synchronize
    seconds = []
    for _ in range(rounds + 1):
        wait()
        start = time.perf_counter()
        function()
        wait()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def matmul(device, dtype, side, rounds):
    """Return (FLOP/s of each round, relative error of the product against float64)."""
    import torch

    from minigpt4.models.base_model import DTYPES

    generator = torch.Generator().manual_seed(workload.SEED)
    a, b = (torch.randn(side, side, generator=generator).to(DTYPES[dtype]).to(device) for _ in range(2))
    rates = [2 * side**3 / seconds for seconds in timed(device, lambda: a @ b, rounds)]
    exact = a[:64].cpu().double() @ b.cpu().double()
    return rates, ((a @ b)[:64].cpu().double() - exact).norm().div(exact.norm()).item()


def copies(device, size, rounds):
    """Return {kind: bytes a second of each round}; a copy within memory reads and writes."""
    import torch

    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy within memory": [2 * size / s for s in timed(device, lambda: target.copy_(source), rounds)]}
    if device.type == "cuda":
        part = min(size, 2**30)
        for kind, pinned in (("copy to the GPU, pinned", True), ("copy to the GPU", False)):
            host = torch.ones(part, dtype=torch.uint8, pin_memory=pinned)
            copy = lambda host=host: target[:part].copy_(host, non_blocking=True)  # noqa: E731
            found[kind] = [part / seconds for seconds in timed(device, copy, rounds)]
    return found


def read_file(size, rounds):
    """Return bytes a second of reading a file that was just written."""
    buffer, rates = bytearray(2**24), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(bytes(min(size, 2**28)))
        for _ in range(rounds):
            start = time.perf_counter()
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
            rates.append(path.stat().st_size / (time.perf_counter() - start))
    return rates


def kernels(device, rounds, number=2000):
    """Return small kernels started a second."""
    import torch

    x = torch.zeros(1, device=device)

    def start_all():
        for _ in range(number):
            x.add_(1)

    return [number / seconds for seconds in timed(device, start_all, rounds)]


def of_7b(found, device, size):
    """Return what the measured rates allow a model of `size` at most: {what: number}."""
    half = max(found["matmul"]["fp16" if device.type == "cuda" else "bf16"])
    model, _ = memory.setup(size, 1, 1)
    weights = sum(part.bytes for part in model.parts())
    llm = model.llama_model
    read = sum(p.nbytes for p in llm.parameters()) - llm.get_input_embeddings().weight.nbytes
    limits = {f"{size}, stage {stage}: samples/s": half / useful(size, stage) for stage in workload.STAGES}
    limits[f"{size}: tokens/s of one answer"] = max(found["copy within memory"]) / read
    limits[f"{size}: seconds to read {weights / 1e9:.1f} GB of weights"] = weights / max(found["file in memory"])
    return limits


def useful(size, stage):
    """Return the FLOPs that a step of a stage's official batch cannot do without, for each sample."""
    import torch

    from minigpt4.common.memory import without_values

    batch_size = memory.BATCHES[stage]
    model, batch = memory.setup(size, stage, batch_size)
    with without_values(model):
        batch["image"] = torch.empty(batch_size, 3, model.image_size, model.image_size)
        return workload.useful_flops(model, batch) / batch_size


def print_row(name, rates, unit, label):
    low, best = min(rates) / unit, max(rates) / unit
    print(f"{name:<40}{best:>12.4g} [{low:.4g} .. {best:.4g}] {label}")
