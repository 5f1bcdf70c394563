"""Unusable samples: skipped and counted by reason, until there are too many of them.

Skipping neither retries nor ends the run. Once more than `max_bad_fraction` of a worker's samples are
unusable, the run stops with a DataError that says what is wrong.
"""

import logging
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from minigpt4.common.utils import printable
from minigpt4.datasets.datasets.worker_status import worker_info
from minigpt4.processors import ImageError

PROBATION = 1000  # samples that a worker reads before its share of unusable ones is checked
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
    """The data as a whole cannot be used; the message says why and what to change."""


class SkipSample(Exception):
    """One sample cannot be used: `reason` is one of REASONS, `detail` says what was found."""

    def __init__(self, reason: str, detail: str):
        detail = printable(detail)
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@contextmanager
def errors_skipped() -> Iterator[None]:
    """Within the block, which calls a user's code, turn any error into a SkipSample with the line that it is from."""
    try:
        yield
    except (SkipSample, DataError, MemoryError):
        raise
    # a broken file makes decoders raise almost anything, a bad record KeyError
    except Exception as error:
        reason = "bad_image" if isinstance(error, (OSError, ImageError)) else "bad_record"
        # after this frame and the block's: the user's function
        frames = traceback.extract_tb(error.__traceback__)[2:3]
        where = "".join(f" ({Path(each.filename).name} line {each.lineno})" for each in frames)
        raise SkipSample(reason, f"{type(error).__name__}: {error}{where}") from error


class SkipCounter:
    """Counts the usable, skipped and held-out samples of one dataset on one rank, and checks their share.

    The counts are in shared memory, one row per worker: this needs no lock, and the main process sees them all.
    `guide` is the document that error messages refer to.
    """

    def __init__(self, name: str, num_workers: int, max_bad_fraction: float, guide: str):
        self.name, self.guide = name, guide
        self.max_bad_fraction = max_bad_fraction
        # columns: usable, one per reason, held out
        shape = (max(1, num_workers), 2 + len(REASONS))
        self.counts = torch.zeros(shape, dtype=torch.int64).share_memory_()
        self.first = self.last = None  # detail of the first skip, label and detail of the last one
        self.is_counting = True  # False while a resumed stream reads samples counted before

    def row(self) -> list[int]:
        """Return this worker's counts: usable, one number per reason, held out."""
        return self.counts[worker_info()[0]].tolist()

    def restore(self, worker: int, row: Sequence[int]) -> None:
        """Set a worker's counts to what `row()` returned; rows of older checkpoints lack the last one, held out."""
        self.counts[worker, : len(row)] = torch.tensor(row)

    def usable(self) -> None:
        """Count one usable sample."""
        self.counts[worker_info()[0], 0] += 1

    def held_out(self) -> None:
        """Count one sample that belongs to the validation split: neither usable nor skipped."""
        self.counts[worker_info()[0], -1] += self.is_counting

    def skip(self, reason: str, where: str, detail: str) -> None:
        """Count one unusable sample. Raises DataError if too many of this worker's samples are unusable."""
        if not self.is_counting:
            return
        row, column = self.counts[worker_info()[0]], 1 + REASONS.index(reason)
        row[column] += 1
        where, detail = printable(where), printable(detail)
        self.first, self.last = self.first or detail, f"{where} {detail}"
        if row[column] == 1:  # only the first sample of each reason is logged
            message = "%s: skipped %s: %s (%s); more of these are only counted"
            logging.warning(message, self.name, where, reason, detail)
        seen, usable = int(row[:-1].sum()), int(row[0])
        if seen < PROBATION:
            return
        if not usable:
            raise self.nothing_usable(row)
        if seen - usable > self.max_bad_fraction * seen:
            raise DataError(
                f"{self.name}: {1 - usable / seen:.1%} of {seen} samples were unusable (limit "
                f"{self.max_bad_fraction:.0%}, run.max_bad_fraction): {_breakdown(row)}; last: {self.last}"
            )

    def nothing_usable(self, row: torch.Tensor | None = None) -> DataError:
        """Return the DataError that says why no sample could be used; `row`: counts, by default of all workers."""
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
        """Return {"seen": samples read, reason: how many were skipped for it, ..}, summed over workers.

        If samples were held out for the validation split, "held_out" counts them; "seen" does not include
        them. `rows`: counts of the workers at an earlier time, as `row()` returned them.
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
