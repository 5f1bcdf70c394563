"""What a batch holds: samples of one dataset put together."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch.utils.data import default_collate

from minigpt4.datasets.datasets.whereabouts import worker_place


def collate(samples: Sequence[dict]) -> dict[str, Any]:
    """Return the batch of some samples (see BaseDataset).

    "image" is [B, 3, S, S], or bytes [B, S, S, 3] where the processor leaves normalising to the device
    (see minigpt4.common.device.to_device). Where a sample has "images" it is those of all samples in their
    order, N instead of B ([0, 3, 0, 0] without any), and "num_images", which then comes first, has B
    integers. "normalise" is that of one sample and left out without an image, "image_id" an int64
    tensor [B] of integers; all else is a list of length B, with () for what only other samples have.
    """
    batch = {}
    groups = [sample["images"] if "images" in sample else [sample["image"]] for sample in samples]
    images = list(chain.from_iterable(groups))
    if any("images" in sample for sample in samples):
        batch["num_images"] = list(map(len, groups))
    # in a worker the stack is written to shared memory at once
    batch["image"] = default_collate(images) if images else torch.empty(0, 3, 0, 0)
    for key in dict.fromkeys(chain.from_iterable(samples)):
        if key not in ("image", "images"):
            batch[key] = [sample.get(key, ()) for sample in samples]
    # a batch never mixes datasets: one "normalise" is that of all
    normalise = next(filter(None, batch.pop("normalise", ())), None)
    if normalise and images:
        batch["normalise"] = normalise
    if all(isinstance(number, int) for number in batch.get("image_id", [""])):
        batch["image_id"] = torch.tensor(batch["image_id"])
    return batch


def collate_with_progress(dataset: Any, samples: Sequence[dict]) -> dict[str, Any]:
    """Return a batch that notes how far this worker has come: "progress" (worker, position, counts).

    The position is that of a stream, None for map-style data; the counts are `SkipCounter.row()`.
    """
    positions = [sample.pop("stream", None) for sample in samples]
    return collate(samples) | {"progress": (worker_place()[0], positions[-1], dataset.skips.row())}


def collate_usable(samples: Sequence[dict | None]) -> dict[str, Any]:
    """Return the batch of those samples that could be used; {} without any."""
    samples = [sample for sample in samples if sample is not None]
    return collate(samples) if samples else {}
