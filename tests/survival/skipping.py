"""What bad samples cost, and what it costs to go on in the middle of an epoch of tar shards. On one core, no workers.

200 samples of which 24 are bad against 200 good ones, in turns; then the stream is brought back behind 100,000 raw
samples, at a tenth of that, a half and all of it: nothing is decoded, so only the bytes read count.
"""

import io
import itertools
import json
import logging
import os
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks import machine

HELP = "cost of bad samples, and of going on within an epoch of tar shards"
BAD = {"jpg": 8, "json": 8, "no jpg": 8}  # of 200; unreadable images, unreadable captions, no image at all
MAX_COST = 0.05
SHARD_SIZE = 1000


def add_arguments(parser):
    parser.add_argument("--rounds", type=int, default=15, help="pairs of passes (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=100_000, help="raw samples to go on behind (default: 100000)")


def run(args):
    logging.disable(logging.WARNING)  # each pass would name its first bad samples
    with tempfile.TemporaryDirectory() as scratch:
        cost = cost_of_bad_samples(Path(scratch), args.rounds)
        restores = restore(Path(scratch), args.samples)
    return {"cost_of_bad_samples": cost, "restore": restores, "passed": cost < MAX_COST, **machine.description()}


def cost_of_bad_samples(folder, rounds):
    """Return the median of (seconds with bad samples / seconds with good ones) - 1."""
    good = [_pair(number, (256, 256)) for number in range(200)]
    bad, kinds = list(good), itertools.cycle(BAD)
    for number in range(0, 24 * 8, 8):
        bad[number] = _broken(good[number], next(kinds))
    datasets = {
        name: _dataset(_write(folder / f"{name}.tar", s), epochs=1) for name, s in (("good", good), ("bad", bad))
    }
    for dataset in datasets.values():  # files and code are warm
        _seconds(dataset)
    ratios = []
    for _ in range(rounds):
        seconds = {name: _seconds(dataset) for name, dataset in datasets.items()}
        ratios.append(seconds["bad"] / seconds["good"] - 1)
    print(
        f"200 samples with {sum(BAD.values())} bad ones against 200 good ones: {median(ratios):+.1%} "
        f"(median of {rounds} pairs, {min(ratios):+.1%} .. {max(ratios):+.1%}; limit +{MAX_COST:.0%})"
    )
    print(f"counted: {datasets['bad'].skips.report()}")
    return median(ratios)


def restore(folder, samples):
    """Return [{"samples", "mib", "seconds", "seconds_per_1000"}] for going on behind some samples of one epoch."""
    members = _pair(0, (224, 224))
    shards = -(-(samples + 2000) // SHARD_SIZE)
    first = _write(folder / "0.tar", [members] * SHARD_SIZE)
    for shard in range(1, shards):
        os.link(first, folder / f"{shard}.tar")
    rows = []
    print(f"{'raw samples':>12}{'MiB read':>10}{'seconds':>9}{'s / 1000':>10}{'MiB/s':>8}")
    for count in (samples // 10, samples // 2, samples):
        dataset = _dataset(f"{folder}/{{0..{shards - 1}}}.tar")
        dataset.start = {0: (0, count)}
        before, start = bytes_read(), time.perf_counter()
        assert next(iter(dataset))["stream"] == (0, count + 1)
        seconds, mib = time.perf_counter() - start, (bytes_read() - before) / 2**20
        rows.append({"samples": count, "mib": mib, "seconds": seconds, "seconds_per_1000": 1000 * seconds / count})
        print(f"{count:12}{mib:10.0f}{seconds:9.2f}{1000 * seconds / count:10.4f}{mib / seconds:8.0f}")
    return rows


def bytes_read():
    """Return how many bytes this process has read so far, from whatever file."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def _dataset(location, epochs=None):
    from minigpt4.datasets.datasets.web_dataset import WebCaptionDataset
    from minigpt4.processors import Blip2ImageTrainProcessor

    return WebCaptionDataset(location, Blip2ImageTrainProcessor(image_size=224), name="laion", epochs=epochs)


def _seconds(dataset):
    dataset.bind(dataset.place)
    start = time.process_time()
    for _ in dataset:
        pass
    return time.process_time() - start


def _pair(number, size):
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(number).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return {"jpg": buffer.getvalue(), "json": json.dumps({"caption": f"Caption {number}."}).encode()}


def _broken(members, kind):
    if kind == "no jpg":
        return {"json": members["json"]}
    return members | {kind: members[kind][: len(members[kind]) // 3]}


def _write(path, samples):
    with tarfile.open(path, "w") as tar:
        for number, members in enumerate(samples):
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{number:09}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)
