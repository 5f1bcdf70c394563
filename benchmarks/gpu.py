"""Training and answers at 7B on this GPU, in calls of at most five minutes, the most valuable figures first.

`--part train`: parity; a training step of both stages as a user gets it, beside 2023, with energy and cost; then the ways
between, the time of each kernel, the ViT's attention kernels, a small batch. `--part answers`: tokens a second, beside
what the memory bandwidth allows; prompts of new lengths; quantised weights. `--part products`: the matrix products of a
token of an answer, candidate kernels beside what the chat runs today. All in one process, with weights drawn on the GPU.
Each step of the measurement has a time limit, a step that fails does not stop the others, and the figures so far are
written after every step. Needs only torch, transformers, timm and omegaconf.
"""

import importlib
import json
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness

HELP = (
    "training and answers at 7B on this GPU, in calls of at most five minutes: --part train, --part answers; "
    "--part products: kernels for the products of a token, candidates beside today's"
)
# {part: its module}, imported on demand: one needs triton, which only the GPU builds of torch bring along
PARTS = {"train": "training_on_gpu", "answers": "answers_on_gpu", "products": "products_on_gpu"}
OPTIONS = {
    "--part": {"choices": list(PARTS), "default": "train", "help": "(default: %(default)s)"},
    "--seconds": {"type": int, "default": 290, "help": "time limit (default: %(default)s)"},
    "--price": {
        "type": float,
        "default": 3.0,
        "help": "of a GPU hour, in any currency (default: %(default)s)",
    },
    "--rehearsal": {
        "action": "store_true",
        "help": "small sizes, to see that it runs; no gates",
    },
}


class Steps:
    """Runs the steps of a measurement, each with a time limit, and writes `found`, all figures so far, after each."""

    def __init__(self, seconds: float, path: Path | None):
        self.start = time.perf_counter()
        self.end, self.path = self.start + seconds, path
        self.found = {"rows": [], "steps": {}, "passed": True, **harness.description()}
        signal.signal(signal.SIGALRM, self._too_long)

    @staticmethod
    def _too_long(*args: Any) -> None:
        raise TimeoutError("the step took too long")

    def run(self, name: str, step: Callable[[], dict], limit: int) -> None:
        """Run `step()` for at most `limit` seconds; keep the rows and other figures that it returns, or its error."""
        began = time.perf_counter()
        left = self.end - began
        if left < 5:
            self.found["steps"][name] = {"left out": "no time"}
            return
        signal.alarm(int(min(limit, left)))
        try:
            figures = step()
            self.found["rows"] += figures.pop("rows", [])
        except Exception as error:  # whatever it is, the following steps can still be measured
            figures = {"error": f"{type(error).__name__}: {str(error)[:2000]}"}
            self.found["passed"] = False
            print(f"{name}: {figures['error']}", file=sys.stderr)
        finally:
            signal.alarm(0)
        now = time.perf_counter()
        self.found["steps"][name] = {"seconds": now - began, **figures}
        print(f"-- {name}: {now - began:.0f} s, at {now - self.start:.0f} s", flush=True)
        if self.path:
            self.path.write_text(
                json.dumps(self.found, indent=1, default=str) + "\n", encoding="utf-8"
            )


def run(args: Namespace) -> dict:
    """Run a part; return its rows and figures. Ends the program where there is no GPU."""
    if not torch.cuda.is_available():
        sys.exit(
            "python -m benchmarks gpu: torch sees no GPU; `python -m benchmarks all` needs none"
        )
    path = Path(args.json) if args.json and args.json != "-" else None
    steps = Steps(args.seconds, path)
    part = importlib.import_module(f"benchmarks.{PARTS[args.part]}")
    for name, step, limit in part.steps(args):
        # a rehearsal may run without a real GPU, where compiling takes long
        steps.run(name, step, limit * 20 if args.rehearsal else limit)
    if args.rehearsal:
        for row in steps.found["rows"]:
            row["passed"] = True
    return steps.found
