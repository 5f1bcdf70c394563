"""What every dataset shares: its place in the run, its counts of skipped samples, its seeded augmentation.

A sample that cannot be used is skipped and counted by reason, without waiting and without ending the run, until the
budget is spent: then the run stops with a DataError that says what is wrong with the data.
"""

import hashlib
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.utils.data import get_worker_info

PROBATION = 1000  # samples of one worker before its bad fraction is judged
REASONS = ("bad_shard", "bad_record", "no_image", "no_caption", "bad_caption", "missing_file", "bad_image")


class DataError(ValueError):
    """The data as a whole is unusable; the message says why and what to change."""


class SkipSample(Exception):
    """One sample is unusable: `reason` is one of REASONS, `detail` says what was found."""

    def __init__(self, reason, detail):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def worker_place():
    """Return (index of this DataLoader worker, number of workers); (0, 1) in the main process.

    A DataLoader asks its workers in turn, beginning with the first. One that goes on where another one stood begins
    with the worker whose turn it was: indices are counted from the dataset's `first_worker`.
    """
    info = get_worker_info()
    if not info:
        return 0, 1
    return (info.id + getattr(info.dataset, "first_worker", 0)) % info.num_workers, info.num_workers


@contextmanager
def seeded_by(*identity):
    """Within the block torch's CPU generator is seeded by `identity`; afterwards it goes on as if nothing happened.

    A sample's augmentation then depends on what it is, not on which worker met it or what came before. The CUDA
    generators are left alone: `torch.manual_seed` would reset the model's dropout for each sample.
    """
    digest = hashlib.blake2b("/".join(map(str, identity)).encode(), digest_size=8).digest()
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(int.from_bytes(digest, "little") >> 1)
    try:
        yield
    finally:
        torch.set_rng_state(state)


class SkipCounter:
    """Usable and skipped samples of one dataset on one rank, and the budget.

    The counts lie in shared memory, one row a worker, so that workers need no lock and the main process sees all.
    """

    def __init__(self, name, num_workers=0, max_bad_fraction=0.05, guide="dataset/README_1_STAGE.md"):
        self.name, self.max_bad_fraction, self.guide = name, max_bad_fraction, guide
        self.counts = torch.zeros(max(1, num_workers), 1 + len(REASONS), dtype=torch.int64).share_memory_()
        self.first = self.last = None
        self._is_counting = True

    @contextmanager
    def uncounted(self):
        """Within the block nothing is counted: it goes a second time over what was counted before."""
        self._is_counting = False
        try:
            yield
        finally:
            self._is_counting = True

    def row(self):
        """Return this worker's counts as a list: usable, then one number a reason."""
        return self.counts[worker_place()[0]].tolist()

    def usable(self):
        """Count one usable sample."""
        self.counts[worker_place()[0], 0] += 1

    def skip(self, reason, where, detail):
        """Count one unusable sample. Raises DataError once this worker's budget is spent."""
        if not self._is_counting:
            return
        row = self.counts[worker_place()[0]]
        row[1 + REASONS.index(reason)] += 1
        self.first, self.last = self.first or detail, f"{where} {detail}"
        if row[1 + REASONS.index(reason)] == 1:
            logging.warning("%s: skipped %s: %s (%s); more of these are only counted", self.name, where, reason, detail)
        seen, usable = int(row.sum()), int(row[0])
        if seen < PROBATION:
            return
        if not usable:
            raise self.nothing_usable(row)
        if seen - usable > self.max_bad_fraction * seen:
            raise DataError(
                f"{self.name}: {1 - usable / seen:.1%} of {seen} samples were unusable (limit "
                f"{self.max_bad_fraction:.0%}, run.max_bad_fraction): {_breakdown(row)}; last: {self.last}"
            )

    def nothing_usable(self, row=None):
        """Return the DataError that says why no sample at all could be used; by default of all workers' samples."""
        row = self.counts.sum(0) if row is None else row
        seen, counts = int(row.sum()), _by_reason(row)
        if not seen:
            return DataError(f"{self.name}: not one usable sample was found; see {self.guide}")
        if counts.keys() <= {"no_image", "no_caption"}:
            found = f"had no 'jpg' + 'json' pair (first keys: {self.first})"
        else:
            found = f"were unusable ({_breakdown(row)}; last: {self.last})"
        return DataError(f"{self.name}: {seen} of the first {seen} samples {found}; see {self.guide}")

    def report(self, rows=None):
        """Return {"seen": samples met, reason: how many were skipped for it, ...}, summed over workers.

        `rows`: their counts at some earlier time, as `row()` gave them; by default those of now.
        """
        total = self.counts.sum(0) if rows is None else torch.tensor([*rows, [0] * (1 + len(REASONS))]).sum(0)
        return {"seen": int(total.sum()), **_by_reason(total)}


def _by_reason(row):
    return {reason: int(count) for reason, count in zip(REASONS, row[1:], strict=True) if count}


def _breakdown(row):
    return ", ".join(f"{count} {reason}" for reason, count in _by_reason(row).items())


@dataclass(frozen=True)
class Place:
    """Where in the run a dataset is read: all that its order depends on beside its own contents."""

    seed: int = 0
    rank: int = 0
    world_size: int = 1


class BaseDataset:
    """Processors, a name, the mixing ratio that the configuration gave, and the place in the run."""

    guide = "dataset/README_1_STAGE.md"  # says how the data is prepared

    def __init__(self, vis_processor, text_processor=None, name="dataset"):
        self.vis_processor, self.text_processor, self.name = vis_processor, text_processor, name
        self.sample_ratio = None
        self.batch_size = None  # overrides run.batch_size_train
        self.first_worker = 0  # whose turn it is, see worker_place
        self.leaves_normalising = False  # a loader whose batches go through `to_device` sets it
        self.bind(Place())

    def bind(self, place, num_workers=0, max_bad_fraction=0.05):
        """Set the place in the run and start counting anew; before workers start."""
        self.place = place
        self.skips = SkipCounter(self.name, num_workers, max_bad_fraction, self.guide)

    def listing(self):
        """Return what there is to read, as a list: the records, here, or the names of the shards."""
        return self.annotation

    @cached_property
    def fingerprint(self):
        """A text that is equal for equal listings, wherever the files lie."""
        return hashlib.blake2b(repr(self.listing()).encode(), digest_size=8).hexdigest()

    def prepare(self, image, text, *identity):
        """Return {"image": [3, S, S], "text_input": str}; random augmentation is seeded by the run and `identity`.

        `text` is a caption, or the (question, answer) pairs of a conversation: these are in the sample as "turns", and
        the first answer takes the caption's place. Captions and answers go through the text processor.

        With `leaves_normalising`, and a processor that can, the image is uint8 [S, S, 3] and "normalise" turns it, or a
        batch of them, into what the processor would have given.
        """
        process, normalise = self.vis_processor, None
        if self.leaves_normalising and hasattr(process, "halves"):
            process, normalise = process.halves()
        with seeded_by(self.place.seed, *identity):
            sample = {"image": process(image)}
        if normalise is not None:
            sample["normalise"] = normalise
        clean = self.text_processor or str
        if isinstance(text, str):
            return sample | {"text_input": clean(text)}
        turns = tuple((question, clean(answer)) for question, answer in text)
        return sample | {"text_input": turns[0][1], "turns": turns}
