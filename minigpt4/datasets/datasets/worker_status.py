"""Which DataLoader worker this process is, and a shared table in which workers report what they are doing."""

import os

import torch
from torch.utils.data import get_worker_info


def worker_info() -> tuple[int, int]:
    """Return (index of this DataLoader worker, number of workers); (0, 1) in the main process.

    A DataLoader takes batches from its workers in turn, starting with the first one. After a resume it has to
    start with the worker whose turn it was, so indices are counted from the dataset's `first_worker`.
    """
    info = get_worker_info()
    if not info:
        return 0, 1
    return (info.id + getattr(info.dataset, "first_worker", 0)) % info.num_workers, info.num_workers


class WorkerStatus:
    """A table in shared memory, one row per worker: process ID, current shard, samples fast-forwarded on resume."""

    def __init__(self, num_workers: int):
        self._rows = torch.zeros(max(1, num_workers), 3, dtype=torch.int64).share_memory_()
        self._rows[:, 1] = -1

    def set_process(self, worker: int) -> None:
        """Record that a worker runs in this process."""
        self._rows[worker, 0] = os.getpid()

    def set_shard(self, worker: int, shard: int) -> None:
        """Record the index of the shard that a worker opens."""
        self._rows[worker, 1] = shard

    def count_fast_forwarded(self, worker: int) -> None:
        """Count one sample that a worker reads only to get back to where the run stopped."""
        self._rows[worker, 2] += 1

    def process_and_shard(self, worker: int) -> tuple[int, int | None]:
        """Return (process ID, 0 before the worker has started; index of its shard, None before it opens one)."""
        process, shard = self._rows[worker, :2].tolist()
        return process, None if shard < 0 else shard

    def num_fast_forwarded(self, worker: int) -> int:
        """Return the number of samples that a worker has fast-forwarded over."""
        return int(self._rows[worker, 2])
