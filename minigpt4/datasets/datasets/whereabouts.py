"""Which process of those that read a dataset this is, and what each of them is at, for the main process to tell."""

import os

import torch
from torch.utils.data import get_worker_info


def worker_place() -> tuple[int, int]:
    """Return (index of this DataLoader worker, number of workers); (0, 1) in the main process.

    A DataLoader asks its workers in turn, beginning with the first. One that resumes begins with
    the worker whose turn it was: indices are counted from the dataset's `first_worker`.
    """
    info = get_worker_info()
    if not info:
        return 0, 1
    return (info.id + getattr(info.dataset, "first_worker", 0)) % info.num_workers, info.num_workers


class Whereabouts:
    """Notes in shared memory, one row a worker: process, shard, samples passed over on the way to where a run stood."""

    def __init__(self, num_workers: int):
        self._rows = torch.zeros(max(1, num_workers), 3, dtype=torch.int64).share_memory_()
        self._rows[:, 1] = -1

    def begin(self, worker: int) -> None:
        """Note the process of a worker, which is this one."""
        self._rows[worker, 0] = os.getpid()

    def reads(self, worker: int, shard: int) -> None:
        """Note the number of the shard that it opens."""
        self._rows[worker, 1] = shard

    def pass_by(self, worker: int) -> None:
        """Note that it passes over a sample."""
        self._rows[worker, 2] += 1

    def of(self, worker: int) -> tuple[int, int | None]:
        """Return (process of a worker, 0 before it begins; the number of its shard, None if it has none)."""
        process, shard = self._rows[worker, :2].tolist()
        return process, None if shard < 0 else shard

    def passed_by(self, worker: int) -> int:
        """Return the number of samples a worker passed over."""
        return int(self._rows[worker, 2])
