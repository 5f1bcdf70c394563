"""What all measurements share: rows and their table, alternating rounds, subprocesses, comparison of result files.

A *way* is one of the implementations that a measurement compares; the ways alternate, so that a disturbance hits them all.
A command returns {"rows": [row, ..], ..}. A row is one figure: ours beside what 2023 computes and what stock transformers
gives, with the best value possible (`limit`) and the value to be reached (`gate`).
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, stdev
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("torch", "torchvision", "transformers", "timm", "pillow", "webdataset")
# arguments of options that several commands have
DEVICE = {"default": "auto"}
DTYPE = {"choices": ("fp32", "fp16", "bf16"), "help": "(default: fp16 on a GPU, else bf16)"}
ROUNDS = {"type": int, "default": 5, "help": "runs of each way (default: %(default)s)"}
QUICK = {"action": "store_true", "help": "small sizes, to see that it runs; no gates"}
Clock = Callable[[], float]
# keys of a row whose value is a list, with a value for each round, or None
VALUES = ("ours", "2023", "stock")
APART = 3  # standard errors from which `compare` marks a difference


class Command(NamedTuple):
    """A command of `python -m benchmarks`; a module that is a command defines these names itself."""

    HELP: str
    OPTIONS: dict[str, dict]  # {flag: arguments of add_argument}
    run: Callable[[Namespace], dict]


class NotEqual(Exception):
    """The ways do not compute the same, so no speed may be shown; the message says where they differ."""


def row(
    name: str,
    unit: str,
    ours: list[float],
    old: list[float] | None = None,
    stock: list[float] | None = None,
    *,
    limit: float | None = None,
    more_is_better: bool = False,
    at_least: float | None = None,
    at_most: float | None = None,
) -> dict:
    """Return a row; `old` (2023) and `stock` (transformers) hold a value for each round of `ours`.

    `limit`: the best value possible. The gate is either `at_least`, which the ratio to 2023 has to reach, or `at_most`,
    which no value of ours may exceed. "error": the standard error of the ratio; "share": how much of the limit is reached.
    """
    gate = None
    if at_least is not None:
        gate = {"at least": at_least}
    elif at_most is not None:
        gate = {"at most": at_most}
    result = {
        "name": name,
        "unit": unit,
        "ours": ours,
        "2023": old,
        "stock": stock,
        "limit": limit,
        "gate": gate,
    }
    result |= {"ratio": None, "error": None, "share": None}
    if old:
        ratios = [a / b if more_is_better else b / a for a, b in zip(ours, old, strict=True)]
        result["ratio"] = median(ratios)
        result["error"] = stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else None
    if limit:
        result["share"] = median(ours) / limit if more_is_better else limit / median(ours)
    reaches_ratio = at_least is None or result["ratio"] >= at_least
    return result | {"passed": reaches_ratio and (at_most is None or max(ours) <= at_most)}


def print_table(rows: list[dict]) -> None:
    """Print rows: medians, range of ours, ratio to 2023 with its standard error, share of the limit, gate."""
    heads = {
        "ours": 12,
        "[min .. max]": 22,
        "2023": 12,
        "transformers": 14,
        "better than 2023": 18,
        "of limit": 10,
        "needed": 12,
    }
    width = max(len(each["name"]) for each in rows) + 2
    print(
        f"\n{'median of the rounds':<{width}}"
        + "".join(f"{head:>{size}}" for head, size in heads.items())
    )
    for each in rows:
        ours, old, stock = (
            f"{median(each[way]):.3g} {each['unit']}" if each[way] else "-" for way in VALUES
        )
        spread = (
            f"[{min(each['ours']):.3g} .. {max(each['ours']):.3g}]"
            if len(each["ours"]) > 1
            else "-"
        )
        error = f" +- {each['error']:.2g}" if each["error"] is not None else ""
        ratio = f"{each['ratio']:.3g}{error}" if each["ratio"] else "-"
        share = f"{each['share']:.1%}" if each["share"] else "-"
        needed = "-"
        if each["gate"]:
            ((kind, value),) = each["gate"].items()
            sign = ">=" if kind == "at least" else "<="
            needed = f"{sign} {value:.3g}{'' if each['passed'] else ' FAIL'}"
        cells = zip((ours, spread, old, stock, ratio, share, needed), heads.values(), strict=True)
        print(f"{each['name']:<{width}}" + "".join(f"{cell:>{size}}" for cell, size in cells))


def take_turns(
    ways: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 0
) -> dict[str, list]:
    """Call each way once per round, in an order that is reversed every round; return {way: [its result in each round]}.

    `warm_up`: additional rounds at the start, whose results are dropped.
    """
    results = {way: [] for way in ways}
    for number in range(warm_up + rounds):
        for way in list(ways)[:: 1 if number % 2 else -1]:
            results[way].append(ways[way]())
    return {way: values[warm_up:] for way, values in results.items()}


def timed(
    function: Callable[[], object], device: torch.device, clock: Clock | None = None
) -> Callable[[], float]:
    """Return a function that calls `function`, waits for the device, and returns the seconds that passed.

    `clock`: by default the CPU time of the process where the device is a CPU, else wall time.
    """
    clock = clock or (time.process_time if device.type == "cpu" else time.perf_counter)
    wait = getattr(torch, device.type).synchronize

    def call():
        wait()
        start = clock()
        function()
        wait()
        return clock() - start

    return call


def in_own_process(module: str, *words: object) -> dict:
    """Run `python -m module words..` and return the JSON object that it prints as its last line.

    Raises RuntimeError with the end of the output if there is no such line.
    """
    command = [sys.executable, "-m", module, *map(str, words)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    *_, last = result.stdout.splitlines() or [""]
    if not last.startswith("{"):
        output = f"{result.stdout}\n{result.stderr}"[-3000:]
        raise RuntimeError(
            f"{' '.join(command[1:])} measured nothing (exit code {result.returncode}):\n{output}"
        )
    return json.loads(last)


def description() -> dict:
    """Return {"machine": .., "versions": ..}: the hardware and software of a measurement."""
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    machine |= {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    installed = [
        name for name in LIBRARIES if importlib.util.find_spec("PIL" if name == "pillow" else name)
    ]
    versions = {name: importlib.metadata.version(name) for name in installed}
    return {"machine": machine, "versions": {"python": platform.python_version(), **versions}}


def compare(args: Namespace) -> dict:
    """Print the values that both result files have, with their ratio and its standard error; return these."""
    first, second = (
        json.loads(path.read_text(encoding="utf-8")) for path in (args.first, args.second)
    )
    for path, result in ((args.first, first), (args.second, second)):
        if "rows" not in result:
            raise SystemExit(
                f"{path}: has no rows; expected a file that `python -m benchmarks .. --json` wrote"
            )
    for about in ("machine", "versions"):
        if first.get(about) != second.get(about):
            print(f"another {about.removesuffix('s')}: {first.get(about)} and {second.get(about)}")
    lines = list(compared(first["rows"], second["rows"]))
    width = max((len(line["name"]) for line in lines), default=0)
    print(
        f"{'':<{width}}{args.first.stem[:14]:>16}{args.second.stem[:14]:>16}{'ratio':>10}{'error':>10}"
    )
    for line in lines:
        cells = f"{line['first']:>16.4g}{line['second']:>16.4g}{line['ratio']:>10.4g}{line['error']:>10.2g}"
        print(f"{line['name']:<{width}}{cells}{'  *' * line['apart']}")
    print(f"*: more than {APART} standard errors apart, or another count")
    return {"compared": lines}


def compared(first: list[dict], second: list[dict]) -> Iterator[dict]:
    """Yield {"name", "first", "second", "ratio", "error", "apart"} for each value of a row that both results have.

    Values of a single round that are equal, as counts are, and zeros are left out.
    """
    others = {each["name"]: each for each in second}
    for each in first:
        for way in VALUES:
            values, other = each.get(way), others.get(each["name"], {}).get(way)
            if not values or not other or not median(values):
                continue
            if len(values) == 1 and values == other:
                continue
            ratio = median(other) / median(values)
            error = abs(ratio) * (_relative_error(values) ** 2 + _relative_error(other) ** 2) ** 0.5
            line = {
                "name": f"{each['name']}, {way}",
                "first": median(values),
                "second": median(other),
            }
            yield line | {"ratio": ratio, "error": error, "apart": abs(ratio - 1) > APART * error}


def _relative_error(values):
    """Return the standard error over the rounds, relative to their median."""
    if len(values) < 2 or not median(values):
        return 0.0
    return stdev(values) / len(values) ** 0.5 / median(values)


COMPARE = Command(
    "two result files side by side, with ratio and error",
    {"first": {"type": Path}, "second": {"type": Path}},
    compare,
)
