"""Samples that cannot be used: skipped, counted by reason, and an error once there are too many of them.

A sample that cannot be used is skipped and counted by reason, without waiting and without ending
the run, until the budget is spent: then the run stops with a DataError that says what is wrong.
"""

import logging
from collections.abc import Sequence

import torch

from minigpt4.common.utils import printable
from minigpt4.datasets.datasets.whereabouts import worker_place

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


class SkipCounter:
    """Usable, skipped and held-out samples of one dataset on one rank, and the budget.

    The counts lie in shared memory, one row a worker: no lock, and the main process sees all.
    """

    def __init__(self, name: str, num_workers: int, max_bad_fraction: float, guide: str):
        self.name, self.guide = name, guide
        self.max_bad_fraction = max_bad_fraction
        # columns: usable, one a reason, held out
        shape = (max(1, num_workers), 2 + len(REASONS))
        self.counts = torch.zeros(shape, dtype=torch.int64).share_memory_()
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
