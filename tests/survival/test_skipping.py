"""What bad samples cost, and what it costs to resume in the middle of an epoch of tar shards. On one core, no workers.

200 samples of which 24 are bad against 200 good ones, in turns; then the stream is brought back behind 100,000 raw
samples, at a tenth of that, a half and all of it: nothing is decoded, so only the bytes read count.
"""

import io
import itertools
import json
import os
import time
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from PIL import Image

from minigpt4.datasets.datasets.web_dataset import WebCaptionDataset
from minigpt4.processors import Blip2ImageTrainProcessor
from tests.survival.damage import write_tar
from tests.survival.processes import bytes_read

# of 200; unreadable images, unreadable captions, no image at all
BAD = {"jpg": 8, "json": 8, "no jpg": 8}
MAX_COST = 0.05
SHARD_SIZE, ROUNDS, SAMPLES = 1000, 15, 100_000


@pytest.mark.survival
def test_bad_samples_cost_little(tmp_path):
    """The median of (seconds with bad samples / seconds with good ones) - 1."""
    good = [pair(number, (256, 256)) for number in range(200)]
    bad, kinds = list(good), itertools.cycle(BAD)
    for number in range(0, 24 * 8, 8):
        bad[number] = broken(good[number], next(kinds))
    samples = {"good": good, "bad": bad}
    datasets = {
        name: dataset_of(write(tmp_path / f"{name}.tar", samples[name]), epochs=1)
        for name in samples
    }
    for dataset in datasets.values():  # files and code are warm
        seconds_of_a_pass(dataset)
    costs = []
    for _ in range(ROUNDS):
        seconds = {name: seconds_of_a_pass(dataset) for name, dataset in datasets.items()}
        costs.append(seconds["bad"] / seconds["good"] - 1)
    print(
        f"\ncost of 24 bad samples of 200: {median(costs):+.1%} ({min(costs):+.1%} .. {max(costs):+.1%})"
    )
    print(f"counted: {datasets['bad'].skips.report()}")
    assert median(costs) < MAX_COST


@pytest.mark.survival
def test_resuming_within_an_epoch_finds_the_next_sample(tmp_path):
    """The stream is brought back behind some samples of one epoch; prints MiB and seconds."""
    shards = -(-(SAMPLES + 2000) // SHARD_SIZE)
    first = write(tmp_path / "0.tar", [pair(0, (224, 224))] * SHARD_SIZE)
    for shard in range(1, shards):
        os.link(first, tmp_path / f"{shard}.tar")
    print(f"\n{'raw samples':>12}{'MiB read':>10}{'seconds':>9}{'s / 1000':>10}{'MiB/s':>8}")
    for count in (SAMPLES // 10, SAMPLES // 2, SAMPLES):
        dataset = dataset_of(f"{tmp_path}/{{0..{shards - 1}}}.tar")
        dataset.start = {0: (0, count)}
        before, start = bytes_read(), time.perf_counter()
        assert next(iter(dataset))["stream"] == (0, count + 1)
        seconds, mib = time.perf_counter() - start, (bytes_read() - before) / 2**20
        print(
            f"{count:12}{mib:10.0f}{seconds:9.2f}{1000 * seconds / count:10.4f}{mib / seconds:8.0f}"
        )


def dataset_of(location: str, epochs: int | None = None) -> WebCaptionDataset:
    """Return the samples of shards as training reads them."""
    return WebCaptionDataset(
        location, Blip2ImageTrainProcessor(image_size=224), name="laion", epochs=epochs
    )


def seconds_of_a_pass(dataset: WebCaptionDataset) -> float:
    """Return the seconds of the processor that a pass takes."""
    dataset.bind(dataset.place)
    start = time.process_time()
    for _ in dataset:
        pass
    return time.process_time() - start


def pair(number: int, size: tuple[int, int]) -> dict[str, bytes]:
    """Return the members of a good sample."""
    pixels = np.random.default_rng(number).integers(
        0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8
    )
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return {
        "jpg": buffer.getvalue(),
        "json": json.dumps({"caption": f"Caption {number}."}).encode(),
    }


def broken(members: dict[str, bytes], kind: str) -> dict[str, bytes]:
    """Return the members of a sample that is bad in one way."""
    if kind == "no jpg":
        return {"json": members["json"]}
    return members | {kind: members[kind][: len(members[kind]) // 3]}


def write(path: Path, samples: list[dict[str, bytes]]) -> str:
    """Write a shard; return its path."""
    return str(write_tar(path, {f"{number:09}": members for number, members in enumerate(samples)}))
