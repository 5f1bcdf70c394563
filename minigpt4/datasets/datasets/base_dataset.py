"""The base class of all datasets: rank and seed, train/val split, counts of skipped samples, seeded augmentation."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from minigpt4.common.utils import read_json
from minigpt4.datasets.datasets.skips import SkipCounter, SkipSample, errors_skipped
from minigpt4.datasets.datasets.worker_status import WorkerStatus
from minigpt4.processors import load_image
from minigpt4.processors.pixels import halves


def _digest(text: str) -> "hashlib._Hash":
    content = text.encode("utf-8", "surrogatepass")  # file names need not be valid UTF-8
    return hashlib.blake2b(content, digest_size=8)


@contextmanager
def seeded_by(*identity: object) -> Iterator[None]:
    """Seed torch's CPU generator by `identity` within the block; its previous state is restored afterwards.

    A sample's augmentation then depends on the sample alone, not on the worker that reads it or on what was
    read before. The CUDA generators are left alone: `torch.manual_seed` would also reset the model's dropout.
    """
    seed = int.from_bytes(_digest("/".join(map(str, identity))).digest(), "little") >> 1
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class SampleIndex(int):
    """An index into map-style data that also carries the epoch; any dataset's `__getitem__` accepts it as an int."""

    def __new__(cls, index: int, epoch: int = 0):
        self = super().__new__(cls, index)
        self.epoch = epoch
        return self


@dataclass(frozen=True)
class Place:
    """Seed, rank and world size: with the dataset's contents, all that the order of its samples depends on."""

    seed: int = 0
    rank: int = 0
    world_size: int = 1


def _annotations(path: str | Path) -> list:
    """Return the records of a JSON file: a list, or a mapping with one under "annotations". Raises ValueError."""
    content = read_json(path)
    records = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise ValueError(f'{path}: expected a list of records, or {{"annotations": [..]}}')
    return records


class BaseDataset:
    """What the loaders require of a dataset: processors, a name, its mixing ratio, its place in the run.

    A subclass also inherits one of torch's dataset classes:

    - `Dataset`: it has `__len__` and `__getitem__(index)`; in training the index is a SampleIndex.
    - `IterableDataset`: it has an endless `__iter__` that reads this worker's share (`worker_info`, `place`), starts
      after the position `start[worker]`, and puts each sample's own position under "stream".

    Both have `listing` and, for `inspect`, `one_pass`; both count what they read in `skips`. For a list of records,
    subclass `ImageTextDataset`, which needs only `load`, `label_of` and `image_of`. A dataset that has only
    `__len__` and `__getitem__` is wrapped in a `MapStyleDataset` (`map_style.adapted`). With `ann_paths`, as in
    2023, `annotation` is the list of the records in these files.

    A sample is a dict: "sample_id"; "image", a tensor [3, S, S], or "images", a list of such tensors (empty for
    text alone); and the text to learn: "text_input", a caption or answer, with "instruction" if the sample has a
    question of its own in place of a drawn prompt; or "turns", a tuple of (question, answer). `prepare` makes all
    but the ID.
    """

    guide = "dataset/README_1_STAGE.md"  # how to prepare the data; error messages refer to it
    # as viewers and the chat show an image; the datasets of 2023 use `load_rgb`
    load_image = staticmethod(load_image)

    def __init__(
        self,
        vis_processor: Any = None,
        text_processor: Any = None,
        vis_root: str | Path = "",
        ann_paths: Sequence[str | Path] = (),
        name: str = "dataset",
    ):
        self.vis_processor, self.text_processor = vis_processor, text_processor
        self.vis_root, self.name = vis_root, name
        if ann_paths:
            self.annotation = list(chain.from_iterable(map(_annotations, ann_paths)))
        self.sample_ratio = None  # share of the batches, relative to the other datasets
        self.batch_size = None  # overrides run.batch_size_train
        self.first_worker = 0  # the worker whose turn it is after a resume, see `worker_info`
        self.leaves_normalising = False  # True in a loader, whose batches `to_device` normalises
        self.is_val, self.val_fraction = False, None
        self.bind(Place())

    def bind(self, place: Place, num_workers: int = 0, max_bad_fraction: float = 0.05) -> None:
        """Set the place in the run and reset the counts; must be called before workers start."""
        self.place = place
        self.skips = SkipCounter(self.name, num_workers, max_bad_fraction, self.guide)
        self.worker_status = WorkerStatus(num_workers)

    def set_split(self, is_val: bool, val_fraction: float | None = None) -> None:
        """Make this the training or the validation split; must be called at most once, before anything is read.

        Validation reads each usable sample once, in a fixed order. With `val_fraction` each split
        keeps the samples for which `holds` is true.
        """
        self.is_val, self.val_fraction = is_val, val_fraction

    def holds(self, identity: str) -> bool:
        """Return whether a sample of this identity is in this split. A hash decides, whatever the seed."""
        if self.val_fraction is None:
            return True
        uniform = int.from_bytes(_digest(identity).digest(), "little") / 2**64  # in [0, 1)
        return (uniform < self.val_fraction) == self.is_val

    def usable(self, record: Any, epoch: int) -> dict | None:
        """Return the sample of a record, or None if it cannot be used; either way it is counted."""
        try:
            sample = self.load(record, epoch)
        except SkipSample as skipped:
            self.skips.skip(skipped.reason, self.label_of(record), skipped.detail)
            return None
        self.skips.usable()
        return sample

    def load(self, record: Any, epoch: int) -> dict:
        """Return the sample of a record. Raises SkipSample if the record cannot be used."""
        raise NotImplementedError(f"{type(self).__name__}.load")

    def label_of(self, record: Any) -> str:
        """Return the name of a record in messages."""
        raise NotImplementedError(f"{type(self).__name__}.label_of")

    def listing(self) -> list:
        """Return everything there is to read: the list of records, or in a stream that of the shards' names."""
        return self.annotation

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the listing; it does not depend on where the files are. A resume compares it."""
        # piece by piece, the repr of a list: that of millions of records would take gigabytes
        digest = _digest("[")
        for number, record in enumerate(self.listing()):
            text = f", {record!r}" if number else repr(record)
            digest.update(text.encode("utf-8", "surrogatepass"))
        digest.update(b"]")
        return digest.hexdigest()

    def prepare(
        self, image: Image.Image | list, text: str | Sequence[tuple[str, str]], *identity: object
    ) -> dict:
        """Return {"image": [3, S, S], "text_input": str}; augmentation is seeded by the run's seed and `identity`.

        A list of images becomes the list "images". `text` is a caption, or the (question, answer) pairs of a
        conversation: these become "turns", and "text_input" is the first answer. The text processor is applied
        to captions and answers. Raises SkipSample if a processor raises an error, or leaves nothing of a text.
        """
        sample = self.processed(image, *identity)
        if isinstance(text, str):
            return sample | {"text_input": self.processed_text(text)}
        turns = tuple((question, self.processed_text(answer)) for question, answer in text)
        return sample | {"text_input": turns[0][1], "turns": turns}

    def processed_text(self, text: str) -> str:
        """Return a text after the text processor. Raises SkipSample as `prepare` does."""
        if self.text_processor is None:
            return text
        with errors_skipped():
            processed = self.text_processor(text)
            if text and not processed.strip():
                nothing = f"the text processor leaves nothing of {text!r:.60}"
                raise SkipSample("bad_caption", nothing)
        return processed

    def processed(self, image: Image.Image | list, *identity: object) -> dict:
        """Return {"image": [3, S, S]}, or {"images": list} for a list; augmentation as in `prepare`.

        With `leaves_normalising`, if the processor can be split, an image is uint8 [S, S, 3], and "normalise" turns
        it, or a batch of them, into what the processor would have returned.
        """
        process, normalise = self.vis_processor, None
        if self.leaves_normalising:
            process, normalise = halves(self.vis_processor)
        with seeded_by(self.place.seed, *identity), errors_skipped():
            is_list = isinstance(image, list)
            sample = {"images": list(map(process, image))} if is_list else {"image": process(image)}
        return sample if normalise is None else sample | {"normalise": normalise}
