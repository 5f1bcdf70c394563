"""Adapts any map-style torch dataset, such as one written for the 2023 release, to this package's loaders."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from minigpt4.common.utils import whole_text
from minigpt4.datasets.datasets.base_dataset import BaseDataset, Place, SampleIndex, seeded_by
from minigpt4.datasets.datasets.image_controls import images_of
from minigpt4.datasets.datasets.image_text_dataset import ImageTextDataset
from minigpt4.datasets.datasets.skips import SkipSample, errors_skipped
from minigpt4.text.segments import Part

_V2_TEXTS = ("instruction_input", "answer", "conv_q", "conv_a")  # text keys of MiniGPT-v2's samples
TRIED = 10  # first samples, of which at least one must be usable before a run starts


def adapted(dataset: Any, name: str, vis_processor: Any = None) -> BaseDataset:
    """Return a dataset that the loaders and `inspect` accept: the given one, or a MapStyleDataset around it.

    Raises ValueError, naming the section, if the dataset is neither map-style nor a BaseDataset stream, if it is
    empty, or if none of its first samples can be used.
    """
    is_ours = getattr(type(dataset), "__getitem__", None) is ImageTextDataset.__getitem__
    class_name = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
    if is_ours and not len(dataset):
        raise ValueError(f"datasets.{name}: {class_name} is empty")
    if is_ours or (isinstance(dataset, BaseDataset) and isinstance(dataset, IterableDataset)):
        return dataset
    missing = [
        method for method in ("__len__", "__getitem__") if not hasattr(type(dataset), method)
    ]
    if missing or isinstance(dataset, IterableDataset):
        problem = f"has no {' and no '.join(missing)}" if missing else "is a stream"
        raise ValueError(
            f"datasets.{name}: {class_name} {problem}; a dataset needs __len__ and __getitem__(index), a stream must be a "
            "subclass of WebCaptionDataset: docs/custom_data.md"
        )
    wrapped = MapStyleDataset(dataset, name, vis_processor)
    if fault := wrapped.first_fault():
        raise ValueError(f"datasets.{name}: {class_name} {fault}")
    return wrapped


class MapStyleDataset(ImageTextDataset):
    """Wraps any dataset with `__len__` and `__getitem__(int)` whose samples have "image", and "text_input" or "turns".

    The keys of MiniGPT-v2 are accepted too: "answer" and "instruction_input", "conv_a" and "conv_q"; these may come
    without an image. Torch's generator is seeded by the run for each sample. A sample that raises an error, such as
    Pillow's for a broken image, or that lacks these keys is counted, and the next one replaces it.
    """

    def __init__(self, dataset: Any, name: str, vis_processor: Any = None):
        self.dataset = dataset
        self.shape = None  # of the first image; all must have it, since a batch is one tensor
        super().__init__(
            annotation=list(range(len(dataset))),
            vis_root="",
            vis_processor=getattr(dataset, "vis_processor", vis_processor),
            name=name,
        )
        self.sample_ratio = getattr(dataset, "sample_ratio", None)

    def bind(self, place: Place, num_workers: int = 0, max_bad_fraction: float = 0.05) -> None:
        super().bind(place, num_workers, max_bad_fraction)
        if isinstance(self.dataset, BaseDataset):
            self.dataset.bind(place, num_workers, max_bad_fraction)

    def set_split(self, is_val: bool, val_fraction: float | None = None) -> None:
        super().set_split(is_val, val_fraction)
        if isinstance(self.dataset, BaseDataset):  # its `__getitem__` may call ours
            self.dataset = copy.copy(self.dataset)  # another split may have the same one
            self.dataset.is_val = is_val

    def first_fault(self) -> str | None:
        """Return what is wrong with a dataset that is empty or whose first TRIED samples are all unusable, else None."""
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
        with seeded_by(self.place.seed, epoch, record), errors_skipped():
            sample = self.dataset[SampleIndex(record, epoch)]
        sample = {"sample_id": self.label_of(record)} | _checked(sample)
        for image in images_of(sample):
            shape = list(image.shape)
            self.shape = self.shape or shape
            if shape != self.shape:
                raise SkipSample("bad_image", f"the image is {shape}, the first one {self.shape}")
        return sample

    def label_of(self, record: int) -> str:
        return f"record {record}"

    image_of = label_of


def _checked(sample: Any) -> dict:
    """Return a checked sample: valid Unicode, and a "text_input" also if it has only turns. Raises SkipSample."""
    if not isinstance(sample, Mapping):
        found = type(sample).__name__
        raise SkipSample(
            "bad_record", f"the sample is {found}, not a mapping with image and text_input"
        )
    sample = dict(sample)
    if sample.get("images", ()) is None:
        del sample["images"]
    if not sample.keys() & {"image", "images"} and sample.keys() & set(_V2_TEXTS):
        sample["images"] = []  # a text-only sample of MiniGPT-v2
    if "images" not in sample and sample.get("image") is None:
        raise SkipSample(
            "no_image", f"'image' is missing (keys: {', '.join(map(str, sample)) or 'none'})"
        )
    _check_images(sample)
    if turns := sample.get("turns"):
        sample["turns"] = _checked_turns(turns)
        sample.setdefault("text_input", sample["turns"][0][1])
    for key in ("instruction", "instruction_input", "conv_q"):
        if sample.get(key) and not _is_question(sample[key]):
            raise SkipSample("bad_caption", f"'{key}' is {type(sample[key]).__name__}, not text")
    for key in sample.keys() & {"text_input", "instruction", *_V2_TEXTS}:
        sample[key] = _valid(sample[key])
    # the key of the target text: "text_input", or one of MiniGPT-v2
    targets = [key for key in ("text_input", "answer", "conv_a") if key in sample]
    target = targets[0] if targets else "text_input"
    text = sample.get(target)
    if not isinstance(text, str) or not text.strip():
        found = "empty" if isinstance(text, str) else f"{type(text).__name__}, not text"
        found = found if targets else "missing"
        raise SkipSample(
            "bad_caption", f"'{target}' is {found} (keys: {', '.join(map(str, sample))})"
        )
    return sample


def _check_images(sample: dict) -> None:
    """Raise SkipSample if "images", or else "image", is not what the loaders accept."""
    images = sample.get("images", [sample.get("image")])
    if not isinstance(images, (list, tuple, torch.Tensor)):
        found = type(images).__name__
        raise SkipSample("bad_image", f"'images' is {found}; expected a list of tensors [3, S, S]")
    for image in images:
        shape = list(image.shape) if isinstance(image, (torch.Tensor, np.ndarray)) else []
        is_bytes = shape != [] and image.dtype in (torch.uint8, np.uint8)
        # `BaseDataset.processed` leaves bytes as [S, S, 3] for the device
        channels = shape[::2] if is_bytes else shape[:1]
        if len(shape) != 3 or 3 not in channels:
            found = shape or type(image).__name__
            raise SkipSample(
                "bad_image",
                f"the image is {found}; expected a tensor [3, S, S], as vis_processor gives",
            )


def _checked_turns(turns: Any) -> tuple[tuple[Any, str], ...]:
    """Return the (question, answer) pairs of a sample. Raises SkipSample."""
    if not isinstance(turns, (list, tuple)):
        raise SkipSample("bad_caption", f"'turns' is {type(turns).__name__}, not a list of pairs")
    checked = []
    for number, turn in enumerate(turns):
        is_pair = isinstance(turn, (list, tuple)) and len(turn) == 2 and _is_question(turn[0])
        if not is_pair or not isinstance(turn[1], str) or not turn[1].strip():
            raise SkipSample(
                "bad_caption",
                f"turn {number} is {turn!r:.60}; expected (question, answer), with a text as answer",
            )
        checked.append((_valid(turn[0]), _valid(turn[1])))
    return tuple(checked)


def _is_question(question: Any) -> bool:
    """Return whether this is a text, or a list of texts and IMAGE."""
    parts = [question] if isinstance(question, str) else question
    return isinstance(parts, (list, tuple)) and all(isinstance(part, Part) for part in parts)


def _valid(text: Any) -> Any:
    """Return a text without lone surrogates; anything else unchanged, since a question may mix texts and images."""
    return whole_text(text) if isinstance(text, str) else text
