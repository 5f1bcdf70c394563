"""What this machine can do at best, and what follows for training and answering: the denominators of the other tables.

Measured: square matrix products of random numbers (with their error against float64), copying within memory, and
reading a file that lies in memory. The best of the rounds is the limit.
"""

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import workload
from benchmarks.harness import DEVICE, QUICK, ROUNDS, Clock, row, take_turns, timed
from minigpt4.common.device import resolve_device
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
        rates[dtype], errors[dtype] = matmul(device, dtype, side, args.rounds, time.perf_counter)
        name = f"{dtype} product of {side} x {side}, error {errors[dtype]:.1e}"
        rows.append(row(name, "TFLOP/s", [rate / 1e12 for rate in rates[dtype]]))
    copied, read = copies(device, size, args.rounds), read_file(size, args.rounds)
    for name, values in (("copy within memory", copied), ("file in memory", read)):
        rows.append(row(name, "GB/s", [rate / 1e9 for rate in values]))
    half = max(rates["fp16" if device.type == "cuda" else "bf16"])
    rows += of_model("tiny" if args.quick else "7b", half, max(copied), max(read))
    return {"rows": rows, "errors": errors, "device": str(device)}


def seconds(device: torch.device, call: Callable, rounds: int, clock: Clock | None = time.perf_counter) -> list[float]:
    """Return the seconds of `rounds` calls; one call before them warms up."""
    return take_turns({"": timed(call, device, clock)}, rounds, warm_up=1)[""]


def matmul(device: torch.device, dtype: str, side: int, rounds: int, clock: Clock | None) -> tuple[list[float], float]:
    """Return (FLOP/s of each round, relative error of the product against float64)."""
    generator = torch.Generator().manual_seed(workload.SEED)
    a, b = (torch.randn(side, side, generator=generator).to(DTYPES[dtype]).to(device) for _ in range(2))
    rates = [2 * side**3 / each for each in seconds(device, lambda: a @ b, rounds, clock)]
    exact = a[:64].cpu().double() @ b.cpu().double()
    return rates, ((a @ b)[:64].cpu().double() - exact).norm().div(exact.norm()).item()


def copies(device: torch.device, size: int, rounds: int) -> list[float]:
    """Return bytes a second of each round of copying within memory, which reads and writes."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return [2 * size / each for each in seconds(device, lambda: target.copy_(source), rounds)]


def read_file(size: int, rounds: int) -> list[float]:
    """Return bytes a second of reading a file that was just written."""
    size = min(size, 2**28)
    buffer = bytearray(size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(buffer)
        with open(path, "rb", buffering=0) as file:
            read = lambda: file.seek(0) or file.readinto(buffer)  # noqa: E731
            return [size / each for each in seconds(torch.device("cpu"), read, rounds)]


def of_model(size: str, flops: float, copied: float, file: float) -> list[dict]:
    """Return rows of what these rates (FLOP/s, bytes/s, bytes/s) allow a model of `size` at most."""
    model, _ = workload.meta_model(size, 1, 1)
    weights = sum(part.bytes for part in model.parts())
    llm = model.llama_model
    read = sum(p.nbytes for p in llm.parameters()) - llm.get_input_embeddings().weight.nbytes
    limits = {}
    for stage, batch_size in workload.OFFICIAL_BATCH.items():
        with workload.without_weights(size, stage) as (counted, batch):
            useful = workload.useful_flops(counted, batch) / batch_size
        limits[f"stage {stage}: samples"] = "1/s", flops / useful
    limits["tokens of one answer"] = "1/s", copied / read
    limits[f"reading {weights / 1e9:.1f} GB of weights"] = "s", weights / file
    return [row(f"limit of {size}, {name}", unit, [value]) for name, (unit, value) in limits.items()]
