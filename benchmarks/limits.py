"""What this machine can do at best, and what follows for training and answering: the denominators of the other tables.

Measured: square matrix products of random numbers (with their error against float64), copying within memory, on a GPU
also copying to it and starting kernels, and reading a file that lies in memory. The best of the rounds is the limit.
"""

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import workload
from benchmarks.harness import DEVICE, QUICK, ROUNDS, row
from minigpt4.common.device import resolve_device
from minigpt4.common.memory import without_values
from minigpt4.models.base_model import DTYPES

HELP = "matrix products, memory and start-up reads of this machine, and the limits that follow for 7B"
SIDE = {"cpu": 1024, "cuda": 8192, "mps": 4096}  # of a matrix; quick: 256
COPIED = {"cpu": 2**28, "cuda": 2**32, "mps": 2**30}  # bytes; quick: 2**24
OPTIONS = {"--device": DEVICE, "--rounds": ROUNDS, "--quick": QUICK}


def run(args: Namespace) -> dict:
    """Measure; return rows of the rates, and {"errors"} of the products."""
    device = resolve_device(args.device)
    side, size = (256, 2**24) if args.quick else (SIDE[device.type], COPIED[device.type])
    rates, errors, rows = {}, {}, []
    for dtype in ("fp32", "bf16", "fp16"):
        rates[dtype], errors[dtype] = matmul(device, dtype, side, args.rounds)
        name = f"{dtype} product of {side} x {side}, error {errors[dtype]:.1e}"
        rows.append(row(name, "TFLOP/s", [rate / 1e12 for rate in rates[dtype]]))
    moved = copies(device, size, args.rounds) | {"file in memory": read_file(size, args.rounds)}
    rows += [row(name, "GB/s", [rate / 1e9 for rate in values]) for name, values in moved.items()]
    if device.type == "cuda":
        rows.append(row("small kernels started", "million/s", [k / 1e6 for k in kernels(device, args.rounds)]))
    half = max(rates["fp16" if device.type == "cuda" else "bf16"])
    best = {name: max(values) for name, values in moved.items()}
    rows += of_model("tiny" if args.quick else "7b", half, best["copy within memory"], best["file in memory"])
    return {"rows": rows, "errors": errors, "device": str(device)}


def seconds(
    device: torch.device, function: Callable[[], object], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Return the seconds of `rounds` calls by a clock; one call before them warms up."""
    wait, results = getattr(torch, device.type).synchronize, []
    for _ in range(rounds + 1):
        wait()
        start = clock()
        function()
        wait()
        results.append(clock() - start)
    return results[1:]


def matmul(
    device: torch.device, dtype: str, side: int, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[float], float]:
    """Return (FLOP/s of each round, relative error of the product against float64)."""
    generator = torch.Generator().manual_seed(workload.SEED)
    a, b = (torch.randn(side, side, generator=generator).to(DTYPES[dtype]).to(device) for _ in range(2))
    rates = [2 * side**3 / each for each in seconds(device, lambda: a @ b, rounds, clock)]
    exact = a[:64].cpu().double() @ b.cpu().double()
    return rates, ((a @ b)[:64].cpu().double() - exact).norm().div(exact.norm()).item()


def copies(device: torch.device, size: int, rounds: int) -> dict[str, list[float]]:
    """Return {kind: bytes a second of each round}; a copy within memory reads and writes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    within = seconds(device, lambda: target.copy_(source), rounds)
    rates = {"copy within memory": [2 * size / each for each in within]}
    if device.type == "cuda":
        part = min(size, 2**30)
        for kind, pinned in (("copy to the GPU, pinned", True), ("copy to the GPU", False)):
            host = torch.ones(part, dtype=torch.uint8, pin_memory=pinned)
            copy = lambda host=host: target[:part].copy_(host, non_blocking=True)  # noqa: E731
            rates[kind] = [part / each for each in seconds(device, copy, rounds)]
    return rates


def read_file(size: int, rounds: int) -> list[float]:
    """Return bytes a second of reading a file that was just written."""
    buffer, size = bytearray(2**24), min(size, 2**28)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(bytes(size))

        def read():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

        return [size / each for each in seconds(torch.device("cpu"), read, rounds)]


def kernels(device: torch.device, rounds: int, number: int = 2000) -> list[float]:
    """Return small kernels started a second."""
    x = torch.zeros(1, device=device)

    def start_all():
        for _ in range(number):
            x.add_(1)

    return [number / each for each in seconds(device, start_all, rounds)]


def of_model(size: str, flops: float, copied: float, file: float) -> list[dict]:
    """Return rows of what these rates (FLOP/s, bytes/s, bytes/s) allow a model of `size` at most."""
    model, _ = workload.meta_model(size, 1, 1)
    weights = sum(part.bytes for part in model.parts())
    llm = model.llama_model
    read = sum(p.nbytes for p in llm.parameters()) - llm.get_input_embeddings().weight.nbytes
    limits = {f"stage {stage}: samples": ("1/s", flops / useful(size, stage)) for stage in workload.STAGES}
    limits["tokens of one answer"] = "1/s", copied / read
    limits[f"reading {weights / 1e9:.1f} GB of weights"] = "s", weights / file
    return [row(f"limit of {size}, {name}", unit, [value]) for name, (unit, value) in limits.items()]


def useful(size: str, stage: int) -> float:
    """Return the FLOPs that a step of a stage's official batch cannot do without, for each sample."""
    batch_size = workload.OFFICIAL_BATCH[stage]
    model, batch = workload.meta_model(size, stage, batch_size)
    with without_values(model):
        batch["image"] = torch.empty(batch_size, 3, model.image_size, model.image_size)
        return workload.useful_flops(model, batch) / batch_size
