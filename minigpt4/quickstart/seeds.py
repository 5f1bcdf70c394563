"""What the embedded default learns, over several seeds: quickstart for each, then minimum, median and maximum.

A seed sets both stages' initial projection, order of data and prompts; images, weights and evaluation are the same.
"""

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import ROOT, row

HELP = "accuracy of the embedded default over several seeds (12 minutes each on two cores)"
# a figure's path in the report -> what the worst seed has to reach; a section's name: all of its figures
BARS = {"held_out": 0.9, "held_out.exact": 0.6, "left_out_pairs": 0.5, "left_out_pairs.exact": 0.6}
BARS |= {"questions.all": 0.7}
SECTIONS = ("held_out", "left_out_pairs", "questions", "after_stage1", "style", "above_chance", "seconds")
OPTIONS = {
    "--seeds": {"type": int, "nargs": "+", "default": [41, 42, 43], "help": "default: 41 42 43"},
    "--output": {"type": Path, "default": ROOT / "output", "help": "folder of the runs (default: output)"},
    "--cache-root": {"help": "as for quickstart"},
}


def run(args: Namespace) -> dict:
    """Run quickstart with each seed; return a row for each figure that all reports hold, and what is below its bar."""
    reports = [figures(quickstart(args, seed)) for seed in args.seeds]
    rows, missed = [], []
    # what a control never names is in no report of that seed
    for name in [name for name in reports[0] if all(name in report for report in reports)]:
        values = [report[name] for report in reports]
        rows.append(row(name, "", values))
        bar = BARS.get(name, BARS.get(name.split(".")[0]))
        if bar is not None and min(values) < bar:
            missed.append(f"{name}: {min(values)}, bar {bar}")
    print("\n".join(missed) or "all seeds reach the bars")
    return {"rows": rows, "seeds": args.seeds, "missed": missed, "passed": not missed}


def quickstart(args: Namespace, seed: int) -> dict:
    """Return the report of `make quickstart` with a seed."""
    output = args.output / f"seed-{seed}"
    command = [sys.executable, "-m", "minigpt4.quickstart", "--seed", str(seed), "--output", str(output)]
    command += ["--cache-root", args.cache_root] if args.cache_root else []
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((output / "report.json").read_text())


def figures(report: dict) -> dict[str, float]:
    """Return the numbers of a report that vary with the seed, by their path in it."""
    return dict(_flat({name: report[name] for name in SECTIONS}))


def _flat(node: dict, path: str = "") -> Iterator[tuple[str, float]]:
    for key, value in node.items():
        name = f"{path}.{key}" if path else key
        yield from _flat(value, name) if isinstance(value, dict) else [(name, value)]
