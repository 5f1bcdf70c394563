"""Several measurements in one table, each in its own process. Parity comes first: if it fails, no speed is measured."""

import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

from benchmarks import data
from benchmarks.harness import QUICK, Command, in_own_process

PARTS = {  # {command: (its options with --quick, its options otherwise)}
    "parity": (["--batches", "1", "--device", "cpu"], ["--device", "cpu"]),
    "train": (["--rounds", "3", "--device", "cpu"], ["--device", "cpu"]),
    "load": (["--rounds", "1"], []),
    "chat": (["--rounds", "3", "--turns", "2"], []),
    "serve": (["--rounds", "3"], []),
    "data": (["--rounds", "6", "--images", "320", "--size", data.JUDGED], []),
    "flops": (["--quick"], ["--quick"]),
    "memory": (["--quick"], ["--quick"]),
    "startup": (["--size", "toy", "--rounds", "1", "--quick"], ["--size", "toy"]),
}
COUNTED = ("flops", "memory")  # these measure no time, so they run in parallel


def run_all(args: Namespace) -> dict:
    """Run all parts; return their rows together, and {"parts": the result of each}."""
    lines = {name: [name, *options[not args.quick]] for name, options in PARTS.items()}
    parts, start = {}, time.perf_counter()
    with ThreadPoolExecutor() as pool:
        for name in PARTS:
            if name in COUNTED:
                continue
            parts[name] = part(lines[name])
            if name == "parity" and not parts[name]["passed"]:
                print("FAIL: the errors are too large, no speed is shown")
                return merged(parts, start)
        counting = {name: pool.submit(part, lines[name]) for name in COUNTED if name in PARTS}
    return merged(parts | {name: counted.result() for name, counted in counting.items()}, start)


def part(words: list[str]) -> dict:
    """Run a command in its own process and print how long it took; return its result."""
    start = time.perf_counter()
    result = in_own_process("benchmarks", *words, "--json", "-")
    print(f"{' '.join(words)}: {time.perf_counter() - start:.0f} s", flush=True)
    return result


def merged(parts: dict[str, dict], start: float) -> dict:
    """Return the rows of all parts together; "passed" if every part has passed."""
    rows = []
    for result in parts.values():
        rows += result["rows"]
    passed = all(result["passed"] for result in parts.values())
    return {"rows": rows, "parts": parts, "seconds": time.perf_counter() - start, "passed": passed}


ALL = Command(
    "everything that needs no GPU, as one table; --quick: in less than five minutes on two cores",
    {"--quick": QUICK | {"help": "fewer rounds"}},
    run_all,
)
