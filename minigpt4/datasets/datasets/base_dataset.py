"""What every dataset shares: its place in the run, its split, its counts of skipped samples, its seeded augmentation."""

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
from minigpt4.datasets.datasets.skips import SkipCounter, SkipSample
from minigpt4.datasets.datasets.worker_status import WorkerStatus
from minigpt4.processors import load_image
from minigpt4.processors.pixels import halves


def _digest(text: str) -> "hashlib._Hash":
    content = text.encode("utf-8", "surrogatepass")  # names need not be UTF-8
    return hashlib.blake2b(content, digest_size=8)


@contextmanager
def seeded_by(*identity: object) -> Iterator[None]:
    """Within the block torch's CPU generator is seeded by `identity`; afterwards its state is as it was before.

    A sample's augmentation then depends on what it is, not on which worker met it or what came
    before. The CUDA generators are left alone: `torch.manual_seed` would reset the model's dropout.
    """
    seed = int.from_bytes(_digest("/".join(map(str, identity))).digest(), "little") >> 1
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class SampleIndex(int):
    """The index of a sample in map-style data, any dataset's `__getitem__` takes it; ours is told the epoch by it."""

    def __new__(cls, index: int, epoch: int = 0):
        self = super().__new__(cls, index)
        self.epoch = epoch
        return self


@dataclass(frozen=True)
class Place:
    """Where in the run a dataset is read: all that its order depends on beside its own contents."""

    seed: int = 0
    rank: int = 0
    world_size: int = 1


def _annotations(path: str | Path) -> list:
    """Return the records of a JSON file: a list, or what stands under "annotations". Raises ValueError."""
    content = read_json(path)
    records = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise ValueError(f'{path}: expected a list of records, or {{"annotations": [..]}}')
    return records


class BaseDataset:
    """Processors, a name, the mixing ratio and the place in the run: what a loader asks of a dataset.

    A subclass is also one of torch's dataset classes. With `Dataset` it has `__len__` and
    `__getitem__(index)`, where a training index is a SampleIndex. With `IterableDataset` it has
    `__iter__` without end, which reads this worker's share (`worker_info`, `place`), begins behind
    `start[worker]`, and says under "stream" where each sample stands. Both have `listing`, and
    `one_pass` for `inspect`; both count what they read in `skips`. For records in a list subclass
    `ImageTextDataset`, which needs no more than `load`, `label_of` and `image_of`. One that has but `__len__` and
    `__getitem__` becomes a `MapStyleDataset` (`map_style.adapted`). With `ann_paths`, as in 2023, `annotation` is the
    list of their records.

    A sample is a dict: "sample_id"; "image", a tensor [3, S, S], or "images", a list of such
    tensors, empty for text alone; and what is learnt: "text_input" (a caption or answer), with
    "instruction" where a question of its own takes the drawn prompt's place, or "turns", a tuple of
    (question, answer). `prepare` makes the part behind the id.
    """

    guide = "dataset/README_1_STAGE.md"  # says how the data is prepared
    # as a viewer and the chat show it; 2023's datasets have `load_rgb`
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
        self.first_worker = 0  # whose turn it is, see worker_info
        self.leaves_normalising = False  # set by a loader, whose batches go through `to_device`
        self.is_val, self.val_fraction = False, None
        self.bind(Place())

    def bind(self, place: Place, num_workers: int = 0, max_bad_fraction: float = 0.05) -> None:
        """Set the place in the run and start counting anew; before workers start."""
        self.place = place
        self.skips = SkipCounter(self.name, num_workers, max_bad_fraction, self.guide)
        self.worker_status = WorkerStatus(num_workers)

    def set_split(self, is_val: bool, val_fraction: float | None = None) -> None:
        """Make this the training or the validation split; once, before anything is read.

        Validation reads each usable sample once, in an order that never changes. With
        `val_fraction` each side keeps what `holds` says is its own.
        """
        self.is_val, self.val_fraction = is_val, val_fraction

    def holds(self, identity: str) -> bool:
        """Return whether what has this identity is of this split: a hash decides, for ever and for every seed."""
        if self.val_fraction is None:
            return True
        share = int.from_bytes(_digest(identity).digest(), "little") / 2**64
        return (share < self.val_fraction) == self.is_val

    def usable(self, record: Any, epoch: int) -> dict | None:
        """Return the sample of a record, or None where it is skipped and counted."""
        try:
            sample = self.load(record, epoch)
        except SkipSample as skipped:
            self.skips.skip(skipped.reason, self.label_of(record), skipped.detail)
            return None
        self.skips.usable()
        return sample

    def load(self, record: Any, epoch: int) -> dict:
        """Return the sample of a record. Raises SkipSample if it cannot be used."""
        raise NotImplementedError(f"{type(self).__name__}.load")

    def label_of(self, record: Any) -> str:
        """Return what messages call a record."""
        raise NotImplementedError(f"{type(self).__name__}.label_of")

    def listing(self) -> list:
        """Return what there is to read, as a list: the records, here, or the names of the shards."""
        return self.annotation

    @cached_property
    def fingerprint(self) -> str:
        """A text that is equal for equal listings, wherever the files lie."""
        return _digest(repr(self.listing())).hexdigest()

    def prepare(
        self, image: Image.Image | list, text: str | Sequence[tuple[str, str]], *identity: object
    ) -> dict:
        """Return {"image": [3, S, S], "text_input": str}; augmentation is seeded by the run and `identity`.

        `image` may be a list of images, which are then in the sample as the list "images". `text`
        is a caption, or the (question, answer) pairs of a conversation: these are in the sample as
        "turns", and the first answer takes the caption's place. The text processor makes the texts.
        """
        sample = self.processed(image, *identity)
        clean = self.text_processor or str
        if isinstance(text, str):
            return sample | {"text_input": clean(text)}
        turns = tuple((question, clean(answer)) for question, answer in text)
        return sample | {"text_input": turns[0][1], "turns": turns}

    def processed(self, image: Image.Image | list, *identity: object) -> dict:
        """Return {"image": [3, S, S]}, or {"images": list} of a list; augmentation as in `prepare`.

        With `leaves_normalising` an image is uint8 [S, S, 3] where the processor allows it, and
        "normalise" turns it, or a batch of them, into what the processor would have given.
        """
        process, normalise = self.vis_processor, None
        if self.leaves_normalising:
            process, normalise = halves(self.vis_processor)
        with seeded_by(self.place.seed, *identity):
            is_list = isinstance(image, list)
            sample = {"images": list(map(process, image))} if is_list else {"image": process(image)}
        return sample if normalise is None else sample | {"normalise": normalise}
