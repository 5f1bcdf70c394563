"""What the embedded default learns, over several seeds: quickstart for each, then minimum, median and maximum.

A seed sets both stages' initial projection, order of data and prompts; images, weights and evaluation are the same.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

from benchmarks import machine

HELP = "accuracy of the embedded default over several seeds (12 minutes each on two cores)"
ROOT = Path(__file__).resolve().parents[1]
BARS = {"held_out": 0.9, "left_out_pairs": 0.5, "questions": 0.7}  # of the worst seed; of the whole image: 0.6
EXACT_BAR = 0.6
SECTIONS = ("held_out", "left_out_pairs", "questions", "after_stage1", "style", "above_chance", "seconds")


def add_arguments(parser):
    parser.add_argument("--seeds", type=int, nargs="+", default=[41, 42, 43], help="default: 41 42 43")
    parser.add_argument("--output", type=Path, default=ROOT / "output", help="folder of the runs (default: output)")
    parser.add_argument("--cache-root", help="as for quickstart")


def run(args):
    """Run what is not there yet, print the table, return the figures."""
    reports = {seed: quickstart(args, seed) for seed in args.seeds}
    found = [figures(report) for report in reports.values()]
    # What a control never names is in no report of that seed.
    rows = {name: spread([one[name] for one in found]) for name in found[0] if all(name in one for one in found)}
    print(f"{'':34}{'min':>8}{'median':>8}{'max':>8}")
    for name, row in rows.items():
        print(f"{name:34}" + "".join(f"{value:8.3g}" for value in row.values()))
    return {
        "seeds": args.seeds,
        "figures": rows,
        "passed": not missed(rows),
        "missed": missed(rows),
        **machine.description("transformers"),
    }


def quickstart(args, seed) -> dict:
    output = args.output / f"seed-{seed}"
    command = [sys.executable, "-m", "minigpt4.quickstart", "--seed", str(seed), "--output", str(output)]
    command += ["--cache-root", args.cache_root] if args.cache_root else []
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((output / "report.json").read_text())


def figures(report) -> dict[str, float]:
    """The numbers of a report that vary with the seed, by their path in it."""
    return dict(_flat({name: report[name] for name in SECTIONS}))


def _flat(node, path=""):
    for key, value in node.items():
        name = f"{path}.{key}" if path else key
        yield from _flat(value, name) if isinstance(value, dict) else [(name, value)]


def spread(values) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)}


def missed(rows) -> list[str]:
    """What the worst seed does not reach."""
    found = []
    for name, row in rows.items():
        section, _, key = name.partition(".")
        bar = EXACT_BAR if key == "exact" else BARS.get(section)
        if section in BARS and (section != "questions" or key == "all") and row["min"] < bar:
            found.append(f"{name}: {row['min']}, bar {bar}")
    return found
