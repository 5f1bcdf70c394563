"""Seeded tar shards and image folders for the tests."""

import io
import itertools
import json
import tarfile

import numpy as np
from PIL import Image

from minigpt4.datasets.datasets.caption_datasets import CaptionDataset
from minigpt4.datasets.datasets.dataloader_utils import TrainLoader
from minigpt4.datasets.datasets.web_dataset import WebCaptionDataset
from minigpt4.processors import Blip2ImageTrainProcessor


def jpeg(seed, size=(24, 20)):
    """Return the bytes of a JPEG with noise."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def pair(number, caption=None):
    """Return the members of a usable sample."""
    return {
        "jpg": jpeg(number),
        "json": json.dumps({"caption": caption or f"Caption {number}."}).encode(),
    }


def write_tar(path, samples):
    """Write {key: {extension: bytes}} as a tar and return its path as text."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def shard(folder, name, numbers):
    """Write a shard of usable samples and return its path as text."""
    return write_tar(folder / f"{name}.tar", {f"{number:06d}": pair(number) for number in numbers})


def folder_dataset(folder, numbers, annotations=None, processor=None):
    """Return a dataset of images `<number>.jpg` in `folder`/image, each with a caption."""
    (folder / "image").mkdir(exist_ok=True)
    for number in numbers:
        (folder / "image" / f"{number}.jpg").write_bytes(jpeg(number))
    if annotations is None:
        annotations = [
            {"image_id": str(number), "caption": f"Caption {number}."} for number in numbers
        ]
    (folder / "filter_cap.json").write_text(
        json.dumps({"annotations": annotations}), encoding="utf-8"
    )
    return CaptionDataset(
        processor or Blip2ImageTrainProcessor(image_size=8),
        vis_root=folder / "image",
        ann_paths=[folder / "filter_cap.json"],
        name="cc_sbu_align",
    )


def stream(location, epochs=None, name="laion"):
    """Return a shard dataset of 8-pixel images."""
    return WebCaptionDataset(
        location, Blip2ImageTrainProcessor(image_size=8), name=name, epochs=epochs
    )


def loader(datasets, ratios=None, **settings):
    """Return a TrainLoader of small batches."""
    return TrainLoader(datasets, ratios, **{"batch_size": 4, **settings})


def ids(batches):
    """Return the sample ids of batches in their order."""
    return list(itertools.chain.from_iterable(batch["sample_id"] for batch in batches))
