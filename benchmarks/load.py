"""Seconds and private memory of building the ViT from its file: ours beside the 2023 way, each in its own process.

2023: initialise every value at random in float32, read the file into memory, copy, halve. Ours: meta device, the file
mapped into memory, tensors assigned. Private memory is what only the process holds (RssAnon: no file pages, which all
processes of a machine share and the system may drop). No speed is printed unless both ways give the same tensors.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from benchmarks import machine, release

HELP = "build the ViT from a file on disk: seconds and private memory, beside the 2023 way"
GATES = {"seconds": 40, "private_mib": 100}  # at least this many times better
SIZES = {"vit": 39, "vit-slice": 2}  # blocks of the full width that are used; the file has one more
IMAGE_SIZE, HEAD_OUTPUTS = 224, 1024
MOMENTS = 3  # least builds of ours: a single one takes so little that anything else at work shows in it


def add_arguments(parser):
    parser.add_argument("--size", choices=SIZES, default="vit", help="vit: all 39 blocks; vit-slice: two, for a test")
    parser.add_argument("--rounds", type=int, default=3, help="builds of each kind, alternating (medians are compared)")
    parser.add_argument(
        "--folder",
        type=Path,
        default=release.FOLDER,
        help="where the weight file is written once and kept (2 GB for vit)",
    )


def run(args):
    """Measure, print the table, return the figures."""
    if platform.system() != "Linux":
        sys.exit("python -m benchmarks load: private memory is read from /proc; run it on Linux")
    path = weight_file(args.folder, SIZES[args.size])
    kinds = ("2023", "ours", "ours, every byte read")
    rounds = {kind: [] for kind in kinds}
    for number in range(max(args.rounds, MOMENTS)):
        due = [kind for kind in kinds if number < args.rounds or kind == "ours"]
        for kind in due if number % 2 == 0 else due[::-1]:
            rounds[kind].append(_in_own_process(kind, path, SIZES[args.size]))
    hashes = {result.pop("sha256") for results in rounds.values() for result in results}
    if len(hashes) != 1:
        sys.exit("python -m benchmarks load: the builds differ in their tensors; no speed is shown")
    figures = {
        kind: {key: median(result[key] for result in results) for key in GATES} for kind, results in rounds.items()
    }
    ratios = {kind: {key: figures["2023"][key] / max(figures[kind][key], 1e-3) for key in GATES} for kind in kinds[1:]}
    passed = args.size != "vit" or all(ratios["ours"][key] >= gate for key, gate in GATES.items())
    _print_table(args, path, rounds, ratios, passed)
    return {
        "size": args.size,
        "rounds": rounds,
        "median": figures,
        "ratio": ratios,
        "passed": passed,
        **machine.description("timm"),
    }


def weight_file(folder, depth):
    """Return the path of a ViT file of the released layout: `depth` blocks and one more, norm and head, float16.

    Written at the first call, from random values (one block's, repeated).
    """
    import torch

    path = folder / f"eva_vit_g-{depth}.pth"
    if path.is_file():
        return path
    print(f"writing {path}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {name: tensor.shape for name, tensor in _network(1).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    first = {name: torch.randn(shape, generator=generator).mul_(0.02).half() for name, shape in shapes.items()}
    state = {name: tensor for name, tensor in first.items() if not name.startswith("blocks.")}
    for block in range(depth + 1):
        state |= {n.replace(".0.", f".{block}.", 1): t.clone() for n, t in first.items() if n.startswith("blocks.")}
    width = first["cls_token"].shape[-1]
    for name, shape in {"norm.weight": [width], "norm.bias": [width], "head.weight": [HEAD_OUTPUTS, width]}.items():
        state[name] = torch.ones(shape, dtype=torch.float16)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)
    return path


def _network(depth, device="meta"):
    from minigpt4.models.vision.eva_vit import VIT_MODELS, build_eva_vit

    return build_eva_vit(replace(VIT_MODELS["eva_clip_g"], depth=depth), IMAGE_SIZE, device=device)


def build_2023(path, depth):
    """Return the ViT as in 2023: random float32 values, then the file's, then halved."""
    import torch

    from minigpt4.models.vision.eva_vit import half_linears

    vit = _network(depth, "cpu")  # timm, as the 2023 code, draws for nn.Linear and again from a truncated normal
    vit.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=False)
    half_linears(vit, torch.float16)
    return vit


def build_ours(path, depth):
    """Return the ViT as MiniGPT4 builds it."""
    import torch

    from minigpt4.models.vision.eva_vit import half_linears, load_eva_vit

    vit = _network(depth)
    half_linears(vit, torch.float16)
    load_eva_vit(vit, path, "model.vit_ckpt")
    return vit


def _in_own_process(kind, path, depth):
    command = [sys.executable, "-m", "benchmarks.load", kind, str(path), str(depth)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def _measure(kind, path, depth):
    """Print seconds, the peak of private memory above that of the imports (MiB), and a hash of all tensors."""
    import torch

    build = build_2023 if kind == "2023" else build_ours
    _network(1)  # imports, and first calls inside the libraries, are no part of either way
    before, peak = private_mib(), PeakMemory()
    with peak:
        start = time.perf_counter()
        vit = build(Path(path), depth)
        if kind.endswith("read"):
            for tensor in vit.state_dict().values():
                tensor.flatten().view(torch.int64).max()
        seconds = time.perf_counter() - start
    digest = hashlib.sha256()
    for name, tensor in sorted(vit.state_dict().items()):
        digest.update(name.encode() + str(tensor.dtype).encode() + tensor.numpy().tobytes())
    print(json.dumps({"seconds": seconds, "private_mib": peak.mib - before, "sha256": digest.hexdigest()}))


class PeakMemory:
    """Context that samples this process's private memory; `mib` is the largest seen."""

    def __enter__(self):
        self.mib, self._done = private_mib(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._done.set()
        self._thread.join()
        self.mib = max(self.mib, private_mib())

    def _sample(self):
        while not self._done.wait(0.01):
            self.mib = max(self.mib, private_mib())


def private_mib():
    """Return the memory, in MiB, that only this process holds and that is no copy of a file's pages."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def _print_table(args, path, rounds, ratios, passed):
    size_mib, name = path.stat().st_size / 2**20, f"ViT of {SIZES[args.size]} blocks from {path.name}"
    builds = f"{len(rounds['2023'])} builds, {len(rounds['ours'])} of ours"
    print(f"{name}, {size_mib:.0f} MiB; median of {builds} [min .. max]")
    print(f"{'':<24}{'seconds':>28}{'private MiB':>28}{'faster':>10}{'less memory':>14}")
    for kind, results in rounds.items():
        cells = []
        for key, digits in (("seconds", 3), ("private_mib", 1)):
            values = sorted(result[key] for result in results)
            cells.append(f"{median(values):.{digits}f} [{values[0]:.{digits}f} .. {values[-1]:.{digits}f}]")
        ratio = ratios.get(kind)
        ends = (f"{ratio['seconds']:.0f}x", f"{ratio['private_mib']:.0f}x") if ratio else ("1x", "1x")
        print(f"{kind:<24}{cells[0]:>28}{cells[1]:>28}{ends[0]:>10}{ends[1]:>14}")
    gates = f"at least {GATES['seconds']}x faster, {GATES['private_mib']}x less private memory"
    print(
        f"equal tensors: yes; {gates}: {'PASS' if passed else 'FAIL'}" if args.size == "vit" else "equal tensors: yes"
    )


if __name__ == "__main__":
    _measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))
