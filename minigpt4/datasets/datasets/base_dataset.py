"""What every dataset shares: its place in the run, its counts of skipped samples, its seeded augmentation.

A sample that cannot be used is skipped and counted by reason, without waiting and without ending
the run, until the budget is spent: then the run stops with a DataError that says what is wrong.
"""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import get_worker_info

from minigpt4.common.utils import printable, read_json
from minigpt4.datasets.datasets.whereabouts import Whereabouts
from minigpt4.processors import load_image
from minigpt4.processors.pixels import halves

PROBATION = 1000  # samples of one worker before its bad fraction is judged
REASONS = (
    "bad_shard",
    "bad_record",
    "no_image",
    "no_caption",
    "bad_caption",
    "missing_file",
    "bad_image",
)


class DataError(ValueError):
    """The data as a whole is unusable; the message says why and what to change."""


class SkipSample(Exception):
    """One sample is unusable: `reason` is one of REASONS, `detail` says what was found."""

    def __init__(self, reason: str, detail: str):
        detail = printable(detail)
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def worker_place() -> tuple[int, int]:
    """Return (index of this DataLoader worker, number of workers); (0, 1) in the main process.

    A DataLoader asks its workers in turn, beginning with the first. One that resumes begins with
    the worker whose turn it was: indices are counted from the dataset's `first_worker`.
    """
    info = get_worker_info()
    if not info:
        return 0, 1
    return (info.id + getattr(info.dataset, "first_worker", 0)) % info.num_workers, info.num_workers


def _digest(text: str) -> "hashlib._Hash":
    return hashlib.blake2b(
        text.encode("utf-8", "surrogatepass"), digest_size=8
    )  # names need not be UTF-8


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


class SkipCounter:
    """Usable, skipped and held-out samples of one dataset on one rank, and the budget.

    The counts lie in shared memory, one row a worker: no lock, and the main process sees all.
    """

    def __init__(self, name: str, num_workers: int, max_bad_fraction: float, guide: str):
        self.name, self.guide = name, guide
        self.max_bad_fraction = max_bad_fraction
        # columns: usable, one a reason, held out
        self.counts = torch.zeros(
            max(1, num_workers), 2 + len(REASONS), dtype=torch.int64
        ).share_memory_()
        self.first = self.last = None
        self.is_counting = True  # not while what is read was counted before

    def row(self) -> list[int]:
        """Return this worker's counts: usable, one number a reason, held out."""
        return self.counts[worker_place()[0]].tolist()

    def restore(self, worker: int, row: Sequence[int]) -> None:
        """Set the counts of a worker to what `row()` gave; rows of older checkpoints end before "held out"."""
        self.counts[worker, : len(row)] = torch.tensor(row)

    def usable(self) -> None:
        """Count one usable sample."""
        self.counts[worker_place()[0], 0] += 1

    def held_out(self) -> None:
        """Count one sample that belongs to the validation split; it is neither usable here nor bad."""
        self.counts[worker_place()[0], -1] += self.is_counting

    def skip(self, reason: str, where: str, detail: str) -> None:
        """Count one unusable sample. Raises DataError once this worker's budget is spent."""
        if not self.is_counting:
            return
        row = self.counts[worker_place()[0]]
        row[1 + REASONS.index(reason)] += 1
        # the first of each reason is logged, the last is kept for the error
        where, detail = printable(where), printable(detail)
        self.first, self.last = self.first or detail, f"{where} {detail}"
        if row[1 + REASONS.index(reason)] == 1:
            message = "%s: skipped %s: %s (%s); more of these are only counted"
            logging.warning(message, self.name, where, reason, detail)
        # the budget
        seen, usable = int(row[:-1].sum()), int(row[0])
        if seen >= PROBATION and not usable:
            raise self.nothing_usable(row)
        if seen >= PROBATION and seen - usable > self.max_bad_fraction * seen:
            raise DataError(
                f"{self.name}: {1 - usable / seen:.1%} of {seen} samples were unusable (limit "
                f"{self.max_bad_fraction:.0%}, run.max_bad_fraction): {_breakdown(row)}; last: {self.last}"
            )

    def nothing_usable(self, row: torch.Tensor | None = None) -> DataError:
        """Return the DataError that says why no sample could be used; by default of all workers' samples."""
        row = self.counts.sum(0) if row is None else row
        seen, counts = int(row[:-1].sum()), _by_reason(row)
        if not seen:
            return DataError(f"{self.name}: not one usable sample was found; see {self.guide}")
        if counts.keys() <= {"no_image", "no_caption"}:
            found = f"had no 'jpg' + 'json' pair (first keys: {self.first})"
        else:
            found = f"were unusable ({_breakdown(row)}; last: {self.last})"
        return DataError(
            f"{self.name}: {seen} of the first {seen} samples {found}; see {self.guide}"
        )

    def report(self, rows: Sequence[Sequence[int]] | None = None) -> dict[str, int]:
        """Return {"seen": samples met, reason: how many were skipped for it, ..}, summed over workers.

        "held_out" is there where some were left to the validation split; "seen" does not contain
        them. `rows`: the workers' counts at some earlier time, as `row()` gave them.
        """
        total = torch.zeros_like(self.counts[0])
        for row in self.counts.tolist() if rows is None else rows:
            total[: len(row)] += torch.tensor(row)
        held_out = {"held_out": int(total[-1])} if total[-1] else {}
        return {"seen": int(total[:-1].sum()), **_by_reason(total), **held_out}


def _by_reason(row: torch.Tensor) -> dict[str, int]:
    return {reason: int(count) for reason, count in zip(REASONS, row[1:-1], strict=True) if count}


def _breakdown(row: torch.Tensor) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in _by_reason(row).items())


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
    `__iter__` without end, which reads this worker's share (`worker_place`, `place`), begins behind
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
    load_image = staticmethod(
        load_image
    )  # as a viewer and the chat show it; 2023's datasets have `load_rgb`

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
        self.first_worker = 0  # whose turn it is, see worker_place
        self.leaves_normalising = False  # set by a loader, whose batches go through `to_device`
        self.is_val, self.val_fraction = False, None
        self.bind(Place())

    def bind(self, place: Place, num_workers: int = 0, max_bad_fraction: float = 0.05) -> None:
        """Set the place in the run and start counting anew; before workers start."""
        self.place = place
        self.skips = SkipCounter(self.name, num_workers, max_bad_fraction, self.guide)
        self.whereabouts = Whereabouts(num_workers)

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
        process, normalise = (
            halves(self.vis_processor) if self.leaves_normalising else (self.vis_processor, None)
        )
        with seeded_by(self.place.seed, *identity):
            is_list = isinstance(image, list)
            sample = {"images": list(map(process, image))} if is_list else {"image": process(image)}
        return sample if normalise is None else sample | {"normalise": normalise}
