"""Seconds from the start of train.py to the end of its first step, phase by phase.

Three ways alternate, each start in its own process: ours, ours without reading ahead, and weights loaded as in 2023.
`--cold` drops the weight files from the page cache before every start.
"""

import os
import tempfile
from argparse import Namespace
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from benchmarks import release, workload
from benchmarks.first_step import AS_2023
from benchmarks.harness import QUICK, ROOT, ROUNDS, in_own_process, row, take_turns
from minigpt4.common.config import Config
from minigpt4.common.registry import registry
from minigpt4.common.startup import files_of

HELP = "seconds from process start to the end of the first training step, phase by phase"
EMBEDDED = ROOT / "train_configs/embedded_stage1_pretrain.yaml"
WAYS = {  # {way: options of train.py}
    "loaded as in 2023": [AS_2023, "run.read_ahead=False"],
    "one after the other": ["run.read_ahead=False"],
    "ours": ["run.read_ahead=True"],
}


OPTIONS = {
    "--cfg-path": {
        "default": str(EMBEDDED),
        "help": "(default: the embedded default's first stage)",
    },
    "--size": {
        "choices": list(workload.SIZES),
        "help": "instead: stage 1 of 2023 with random weights of this size",
    },
    "--options": {"nargs": "+", "default": [], "metavar": "KEY=VALUE", "help": "as for train.py"},
    "--rounds": ROUNDS,
    "--quick": QUICK | {"help": "ours and 2023's loading alone"},
    "--cold": {
        "action": "store_true",
        "help": "weight files are not in memory at the start (Linux)",
    },
}


def run(args: Namespace) -> dict:
    """Measure; return a row for each phase and one for all together."""
    if args.size:
        args.cfg_path, args.options = (release.CONFIG, [*release.options(args.size), *args.options])
    ways = dict(WAYS)
    if args.quick:
        del ways["one after the other"]
    files = weight_files(args) if args.cold else []

    def start(options):
        drop_from_memory(files)
        started = one_step(args, options)
        started["seconds"]["all"] = sum(started["seconds"].values())
        return started

    starts = take_turns(
        {way: partial(start, options) for way, options in ways.items()}, args.rounds
    )
    name = f"{args.size or Path(args.cfg_path).stem}{', cold' * args.cold}"
    rows = []
    for phase in starts["ours"][0]["seconds"]:
        ours = [each["seconds"][phase] for each in starts["ours"]]
        old = [each["seconds"][phase] for each in starts["loaded as in 2023"]]
        label = f"start, {name}: {phase}"
        if phase == "all":
            label = f"start to the end of the first step, {name}"
        # there is no ratio for a phase that takes a way no time at all
        rows.append(row(label, "s", ours, old if all(old) and all(ours) else None))
    return {
        "rows": rows,
        "cfg_path": args.cfg_path,
        "size": args.size,
        "cold": args.cold,
        "starts": starts,
    }


def one_step(args: Namespace, way: list[str]) -> dict:
    """Run one training step in its own process; return {"seconds": {phase: seconds}, "cpu_seconds": {..}}."""
    with tempfile.TemporaryDirectory() as folder:
        options = [
            *args.options,
            "run.max_epoch=1",
            "run.iters_per_epoch=1",
            f"run.output_dir={folder}",
        ]
        return in_own_process("benchmarks.first_step", args.cfg_path, *options, *way)


def weight_files(args: Namespace) -> list[Path]:
    """Return all weight files that the configuration names."""
    cfg = Config(Namespace(cfg_path=args.cfg_path, options=args.options)).model_cfg
    return files_of(registry.get_model_class(cfg.arch).weight_files(cfg))


def drop_from_memory(files: Iterable[Path]) -> None:
    """Drop files from the page cache, except for pages that a process has mapped."""
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
