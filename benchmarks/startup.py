"""Seconds from the start of train.py to the end of its first step, phase by phase.

Ours, without reading ahead, and with weights loaded as in 2023, take turns, each in its own process. `--cold` drops the
weight files from the page cache before every start.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from statistics import median

from benchmarks import machine, release, workload

HELP = "seconds from process start to the end of the first training step, phase by phase"
ROOT = Path(__file__).resolve().parents[1]
EMBEDDED = ROOT / "train_configs/embedded_stage1_pretrain.yaml"
AS_2023 = "model.arch=mini_gpt4_loaded_as_2023"
WAYS = {  # -> options
    "loaded as in 2023": [AS_2023, "run.read_ahead=False"],
    "one after the other": ["run.read_ahead=False"],
    "ours": ["run.read_ahead=True"],
}


def add_arguments(parser):
    parser.add_argument("--cfg-path", default=str(EMBEDDED), help="(default: the embedded default's first stage)")
    parser.add_argument(
        "--size",
        choices=list(workload.SIZES),
        help="instead: stage 1 of 2023 with files of random weights of this size",
    )
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="as for train.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="ours and 2023's loading alone")
    parser.add_argument("--cold", action="store_true", help="weight files are not in memory at the start (Linux)")


def run(args):
    """Measure, print the table, return the figures."""
    if args.size:
        args.cfg_path, args.options = release.CONFIG, [*release.options(args.size), *args.options]
    ways = [way for way in WAYS if way != "one after the other" or not args.quick]
    found = {way: [] for way in ways}
    files = weight_files(args) if args.cold else []
    for number in range(args.rounds):
        for way in ways if number % 2 == 0 else ways[::-1]:
            drop_from_memory(files)
            found[way].append(in_own_process(args, WAYS[way]))
    print_table(args, found)
    figures = {"cfg_path": args.cfg_path, "size": args.size, "cold": args.cold, "rounds": found, "passed": True}
    return {**figures, **machine.description()}


def in_own_process(args, way):
    """Return {"seconds", "cpu_seconds": {phase: seconds}} of a run of one step."""
    with tempfile.TemporaryDirectory() as folder:
        options = [*args.options, "run.max_epoch=1", "run.iters_per_epoch=1", f"run.output_dir={folder}"]
        command = [sys.executable, "-m", "benchmarks.startup", args.cfg_path, *options, *way]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"python -m benchmarks startup: train.py failed\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def weight_files(args):
    """Return all files of weights that the configuration names."""
    from minigpt4.common.config import Config
    from minigpt4.common.registry import registry
    from minigpt4.common.startup import files_of

    cfg = Config(Namespace(cfg_path=args.cfg_path, options=args.options)).model_cfg
    return files_of(registry.get_model_class(cfg.arch).weight_files(cfg))


def drop_from_memory(files):
    """Drop files from the page cache; what another process maps at the moment stays."""
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def print_table(args, found):
    name = f"{Path(args.cfg_path).name}{f' at size {args.size}' if args.size else ''}"
    print(f"{name}, weight files {'not ' if args.cold else ''}in memory; seconds (of the processor)")
    print(f"{'':<16}" + "".join(f"{way:>28}" for way in found))
    phases = list(found["ours"][0]["seconds"])
    for phase in [*phases, "all"]:
        cells = []
        for results in found.values():
            wall, cpu = (
                median(sum(result[kind].values()) if phase == "all" else result[kind][phase] for result in results)
                for kind in ("seconds", "cpu_seconds")
            )
            cells.append(f"{wall:.2f} ({cpu:.2f})")
        print(f"{phase:<16}" + "".join(f"{cell:>28}" for cell in cells))
    totals = {way: [sum(result["seconds"].values()) for result in results] for way, results in found.items()}
    spread = "; ".join(f"{way}: {min(values):.2f} .. {max(values):.2f}" for way, values in totals.items())
    print(f"median of {args.rounds}; {spread}")


if __name__ == "__main__":
    import train
    from minigpt4.common.startup import startup

    if AS_2023 in sys.argv:
        from benchmarks import loading_2023  # noqa: F401 (registers the model)

    with contextlib.redirect_stdout(sys.stderr):
        code = train.run_program(train.train, train.parse_args(["--cfg-path", sys.argv[1], "--options", *sys.argv[2:]]))
    print(json.dumps({"seconds": startup.seconds, "cpu_seconds": startup.cpu_seconds}))
    sys.exit(code)
