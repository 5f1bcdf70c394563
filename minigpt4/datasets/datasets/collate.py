"""How samples of one dataset become a batch, and what a batch contains."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch.utils.data import default_collate

from minigpt4.datasets.datasets.worker_status import worker_info


def collate(samples: Sequence[dict]) -> dict[str, Any]:
    """Return the batch of B samples (for their keys see BaseDataset).

    - "image": [B, 3, S, S], or uint8 [B, S, S, 3] where the processor leaves normalising to the device (see
      minigpt4.common.device.to_device). If any sample has "images": the N images of all samples in order, N in
      place of B ([0, 3, 0, 0] if there are none).
    - "num_images", first and only if any sample has "images": a list of B integers.
    - "normalise": that of one sample; absent if there is no image.
    - "image_id": an int64 tensor [B] if all are such integers.
    - every other key of a sample: a list of length B, with () for samples that lack it.
    """
    batch = {}
    groups = [sample["images"] if "images" in sample else [sample["image"]] for sample in samples]
    images = list(chain.from_iterable(groups))
    if any("images" in sample for sample in samples):
        batch["num_images"] = list(map(len, groups))
    # in a worker, default_collate stacks directly into shared memory
    batch["image"] = default_collate(images) if images else torch.empty(0, 3, 0, 0)
    for key in dict.fromkeys(chain.from_iterable(samples)):
        if key not in ("image", "images"):
            batch[key] = [sample.get(key, ()) for sample in samples]
    # a batch never mixes datasets, so one sample's "normalise" holds for all
    normalise = next(filter(None, batch.pop("normalise", ())), None)
    if normalise and images:
        batch["normalise"] = normalise
    if "image_id" in batch and all(map(_is_int64, batch["image_id"])):
        batch["image_id"] = torch.tensor(batch["image_id"])
    return batch


def _is_int64(number: Any) -> bool:
    return isinstance(number, int) and -(2**63) <= number < 2**63


def collate_with_progress(dataset: Any, samples: Sequence[dict]) -> dict[str, Any]:
    """Return a batch with this worker's progress up to it: "progress" is (worker, position, counts).

    `position` is that of a stream, None for map-style data; `counts` is `SkipCounter.row()`.
    """
    positions = [sample.pop("stream", None) for sample in samples]
    return collate(samples) | {"progress": (worker_info()[0], positions[-1], dataset.skips.row())}


def collate_usable(samples: Sequence[dict | None]) -> dict[str, Any]:
    """Return the batch of the usable samples, those that are not None; {} if there are none."""
    usable = [sample for sample in samples if sample is not None]
    return collate(usable) if usable else {}
