"""Datasets as torch knows them, and as they were written for the 2023 release, in the place of the package's own."""

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from minigpt4.datasets.datasets.base_dataset import BaseDataset, Place, SampleIndex, seeded_by
from minigpt4.datasets.datasets.image_text_dataset import ImageTextDataset
from minigpt4.datasets.datasets.record_text import whole_text
from minigpt4.datasets.datasets.skips import DataError, SkipSample
from minigpt4.processors import ImageError

_V2_TEXTS = ("instruction_input", "answer", "conv_q", "conv_a")
TRIED = 10  # samples of which one must be usable, before a run begins


def adapted(dataset: Any, name: str, vis_processor: Any = None) -> BaseDataset:
    """Return a dataset as the loader and `inspect` take it: itself, or a MapStyleDataset of it.

    Raises ValueError, which names the section, for what is neither map-style nor a stream of ours, for an empty
    dataset, and where none of the first samples can be used.
    """
    is_ours = getattr(type(dataset), "__getitem__", None) is ImageTextDataset.__getitem__
    if is_ours or (isinstance(dataset, BaseDataset) and isinstance(dataset, IterableDataset)):
        return dataset
    lacking = [
        method for method in ("__len__", "__getitem__") if not hasattr(type(dataset), method)
    ]
    if lacking or isinstance(dataset, IterableDataset):
        found = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
        has = f"has no {' and no '.join(lacking)}" if lacking else "is a stream"
        raise ValueError(
            f"datasets.{name}: {found} {has}; a dataset needs __len__ and __getitem__(index), a stream must be a "
            "subclass of WebCaptionDataset: docs/custom_data.md"
        )
    whole = MapStyleDataset(dataset, name, vis_processor)
    if fault := whole.first_fault():
        raise ValueError(
            f"datasets.{name}: {type(dataset).__module__}.{type(dataset).__qualname__} {fault}"
        )
    return whole


class MapStyleDataset(ImageTextDataset):
    """Any dataset with `__len__` and `__getitem__(int)`, whose samples have "image", and "text_input" or "turns".

    Or the keys of MiniGPT-v2: "answer" and "instruction_input", "conv_a" and "conv_q"; then also without an image.
    What a processor draws from torch's generator is seeded by the run. A sample that ends in an error, as Pillow's for
    a broken image, or that is of another form, is counted, and the next one stands in.
    """

    def __init__(self, dataset: Any, name: str, vis_processor: Any = None):
        self.dataset, self.shape = dataset, None
        super().__init__(
            list(range(len(dataset))),
            "",
            getattr(dataset, "vis_processor", vis_processor),
            None,
            name,
        )
        self.sample_ratio = getattr(dataset, "sample_ratio", None)
        self.batch_size = getattr(dataset, "batch_size", None)

    def bind(self, place: Place, num_workers: int = 0, max_bad_fraction: float = 0.05) -> None:
        super().bind(place, num_workers, max_bad_fraction)
        if isinstance(self.dataset, BaseDataset):
            self.dataset.bind(place, num_workers, max_bad_fraction)

    def first_fault(self) -> str | None:
        """Return what is wrong with the dataset if it is empty, or if its first TRIED samples are all unusable."""
        faults = []
        for record in range(min(TRIED, len(self))):
            try:
                self.load(record, epoch=0)
                return None
            except SkipSample as skipped:
                faults.append(f"{skipped.reason} ({skipped.detail})")
        if not faults:
            return "is empty"
        return f"gives no usable sample, {len(faults)} were tried; the first: {faults[0]}: docs/custom_data.md"

    def load(self, record: int, epoch: int) -> dict:
        try:
            with seeded_by(self.place.seed, epoch, record):
                sample = self.dataset[SampleIndex(record, epoch)]
        except (SkipSample, DataError, MemoryError):
            raise
        # a broken file makes decoders raise almost anything, a bad record KeyError
        except Exception as error:
            reason = "bad_image" if isinstance(error, (OSError, ImageError)) else "bad_record"
            calls = traceback.extract_tb(error.__traceback__)[1:2]  # behind this one
            where = "".join(f" ({Path(call.filename).name} line {call.lineno})" for call in calls)
            raise SkipSample(reason, f"{type(error).__name__}: {error}{where}") from error
        sample = {"sample_id": self.label_of(record)} | _checked(sample)
        if "image" in sample:
            shape = list(sample["image"].shape)
            self.shape = self.shape or shape  # a batch is one tensor
            if shape != self.shape:
                raise SkipSample("bad_image", f"the image is {shape}, the first one {self.shape}")
        return sample

    def label_of(self, record: int) -> str:
        return f"record {record}"

    image_of = label_of


def _checked(sample: Any) -> dict:
    """Return a sample with whole texts, and with a "text_input" where it has turns alone. Raises SkipSample."""
    if not isinstance(sample, Mapping):
        found = type(sample).__name__
        raise SkipSample(
            "bad_record", f"the sample is {found}, not a mapping with image and text_input"
        )
    sample = dict(sample)
    if not sample.keys() & {"image", "images"} and sample.keys() & set(_V2_TEXTS):
        sample["images"] = []  # the newest release's text alone
    if "images" not in sample and sample.get("image") is None:
        raise SkipSample(
            "no_image", f"'image' is missing (keys: {', '.join(map(str, sample)) or 'none'})"
        )
    for image in sample.get("images", [sample.get("image")]):
        shape = list(image.shape) if isinstance(image, (torch.Tensor, np.ndarray)) else None
        if shape is None or len(shape) != 3 or 3 not in (shape[0], shape[-1]):
            found = shape or type(image).__name__
            raise SkipSample(
                "bad_image",
                f"the image is {found}; expected a tensor [3, S, S], as vis_processor gives",
            )
    if turns := sample.get("turns"):
        sample["turns"] = tuple((_whole(question), _whole(answer)) for question, answer in turns)
        sample.setdefault("text_input", sample["turns"][0][1])
    for key in sample.keys() & {"text_input", "instruction", *_V2_TEXTS}:
        sample[key] = _whole(sample[key])
    # what is learnt: of 2023 and of own datasets, or else of the newest release
    learnt = next(
        (key for key in ("text_input", "answer", "conv_a") if key in sample), "text_input"
    )
    text = sample.get(learnt)
    if not isinstance(text, str) or not text.strip():
        found = "empty" if isinstance(text, str) else f"{type(text).__name__}, not text"
        found = found if learnt in sample else "missing"
        raise SkipSample(
            "bad_caption", f"'{learnt}' is {found} (keys: {', '.join(map(str, sample))})"
        )
    return sample


def _whole(text: Any) -> Any:
    """Return a text without half surrogate pairs; else what it is: a question may be texts and images."""
    return whole_text(text) if isinstance(text, str) else text
