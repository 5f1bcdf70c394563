"""Seconds and private memory of building the ViT from its file: ours beside the 2023 way, each in its own process.

2023: initialise all weights at random in float32, read the file into memory, copy, convert to half precision. Ours: build
on the meta device, map the file into memory, assign its tensors. Private memory is RssAnon: without file pages, which
processes share and the system may drop. No speed is printed unless all builds give the same tensors.
"""

import hashlib
import json
import platform
import sys
import threading
import time
from argparse import Namespace
from functools import partial
from itertools import chain, product
from operator import itemgetter
from pathlib import Path
from statistics import median

import torch
from omegaconf import DictConfig
from torch import nn

from benchmarks import release, workload
from benchmarks.harness import ROUNDS, NotEqual, in_own_process, row, take_turns
from minigpt4.models import MiniGPT4

HELP = "build the ViT from a file on disk: seconds and private memory, beside the 2023 way"
GATES = {"seconds": 40, "private_mib": 100}  # at least this many times better
SIZES = {"vit": "7b", "vit-slice": "7b-thin"}  # {--size: size of workload.SIZES with that ViT}
KINDS = ("2023", "ours", "ours, every byte read")
FIGURES = (("seconds", "s", "build"), ("private_mib", "MiB", "private memory"))  # key, unit, name
OPTIONS = {
    "--size": {
        "choices": SIZES,
        "default": "vit",
        "help": "vit: all 39 blocks; vit-slice: four, for a test",
    },
    "--rounds": ROUNDS | {"default": 3},
    "--folder": {
        "type": Path,
        "default": release.FOLDER,
        "help": "where the weight file is kept (2 GB for vit)",
    },
}


def run(args: Namespace) -> dict:
    """Measure; return the rows, and the figures of all builds. Raises NotEqual where their tensors differ."""
    if platform.system() != "Linux":
        sys.exit("python -m benchmarks load: private memory is read from /proc; run it on Linux")
    folder = args.folder / args.size
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "vit.safetensors").is_file():
        release.write_weights(workload.model_config(SIZES[args.size], folder), folder, ["vit"])
    ways = {
        kind: partial(in_own_process, "benchmarks.load", kind, args.size, folder) for kind in KINDS
    }
    builds = take_turns(ways, args.rounds)
    # at least three of ours: one takes so little time that any other activity disturbs it
    builds["ours"] += [ways["ours"]() for _ in range(3 - args.rounds)]
    hashes = {each.pop("sha256") for each in chain.from_iterable(builds.values())}
    if len(hashes) != 1:
        raise NotEqual("the builds differ in their tensors")
    size = f"ViT of {workload.SIZES[SIZES[args.size]][1][1]} blocks"
    print(
        f"{size}: equal tensors: yes; medians of {args.rounds} builds, of ours {len(builds['ours'])}"
    )
    rows = []
    for kind, (key, unit, what) in product(KINDS[1:], FIGURES):
        # medians: ours is built more often than 2023's; at least 1e-3: private memory may be zero
        ours, old = (max(median(map(itemgetter(key), builds[way])), 1e-3) for way in (kind, "2023"))
        gate = GATES[key] if kind == "ours" and args.size == "vit" else None
        rows.append(
            row(f"{size}: {what}{kind.removeprefix('ours')}", unit, [ours], [old], at_least=gate)
        )
    return {"rows": rows, "size": args.size, "builds": builds}


def build(kind: str, cfg: DictConfig) -> nn.Module:
    """Return the ViT of a `model` section, loaded in one of KINDS."""
    from benchmarks.loading_2023 import LoadedAs2023  # here, because it registers a model

    model = (LoadedAs2023 if kind == "2023" else MiniGPT4)(cfg, torch.float16)
    model.load_vit(cfg)
    if kind.endswith("read"):
        # reads the pages that are only mapped so far
        for tensor in model.visual_encoder.state_dict().values():
            tensor.flatten().view(torch.uint8).max()
    return model.visual_encoder


def _measure(kind, size, folder):
    """Print seconds, the peak of private memory above that of the imports (MiB), and a hash of all tensors."""
    cfg = workload.model_config(SIZES[size], folder)
    # imports and first calls inside the libraries are not to be measured
    MiniGPT4(cfg, torch.float16)
    before, is_done = private_mib(), threading.Event()
    peak = [before]

    def sample():
        while not is_done.wait(0.01):
            peak.append(private_mib())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    start = time.perf_counter()
    vit = build(kind, cfg)
    seconds = time.perf_counter() - start
    is_done.set()
    thread.join()
    digest, peak = hashlib.sha256(), max(*peak, private_mib())
    for name, tensor in sorted(vit.state_dict().items()):
        digest.update(name.encode() + str(tensor.dtype).encode() + tensor.numpy().tobytes())
    print(
        json.dumps({"seconds": seconds, "private_mib": peak - before, "sha256": digest.hexdigest()})
    )


def private_mib() -> float:
    """Return the memory in MiB that this process alone holds, file pages excluded (RssAnon)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


if __name__ == "__main__":
    _measure(*sys.argv[1:])
