"""All measurements at real size on one GPU, with random weights made there; each in its own process."""

import sys
import time

from benchmarks import machine
from benchmarks.processes import measure

HELP = "every measurement at real size on this GPU, in less than nine minutes"
PARTS = (
    "limits",
    "parity --size slice --batches 2 --quantised --compiled",
    "train --size 7b --stage 1 --batch 64 --ladder --compiled",
    "train --size 7b --stage 2 --batch 12 --ladder --compiled",
    "chat",
    "startup --size 7b --rounds 2",
    "memory --quick",
    "flops --quick",
)


def add_arguments(parser):
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="parts whose line begins so")


def run(args):
    """Measure; return the figures of all parts."""
    import torch

    if not torch.cuda.is_available():
        sys.exit("python -m benchmarks gpu: torch sees no GPU; `python -m benchmarks all` needs none")
    start, parts = time.perf_counter(), {}
    for line in PARTS:
        if line.startswith(tuple(args.only)):
            parts[line] = measure(*line.split(), is_shown=True)
    passed = {line: figures["passed"] for line, figures in parts.items()}
    for line, is_good in passed.items():
        print(f"{'PASS' if is_good else 'FAIL'}: {line}")
    figures = {"parts": parts, "seconds": time.perf_counter() - start, "passed": all(passed.values())}
    return {**figures, **machine.description()}
