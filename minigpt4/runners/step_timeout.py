"""Ranks that wait for each other know for whom: a late or lost one is named and ends the run, instead of hanging it."""

import logging
import os
import re
import sys
import threading
import time
from contextlib import contextmanager

import torch.distributed as dist

from minigpt4.common.dist_utils import get_rank, get_world_size


class LostRankError(OSError):
    """Another process of the run is gone."""


class LostWorkerError(OSError):
    """A process that reads data for this one is gone."""


class StepWatch:
    """Each rank notes in the process group's store at which step it arrived, before it waits for the others.

    A thread looks after `timeout_s` without a step who is missing. Contract: `arrived` before every collective of the
    training step, as often on all ranks.
    """

    def __init__(self, timeout_s):
        self.timeout_s, self._count, self._since = timeout_s, 0, time.monotonic()
        self._is_over = threading.Event()
        if get_world_size() > 1:
            self._store = dist.PrefixStore("steps", dist.distributed_c10d._get_default_store())
            self._store.set(str(get_rank()), "0")
            threading.Thread(target=self._watch, daemon=True).start()

    def arrived(self):
        """Note that this rank is about to wait for the others."""
        self._count, self._since = self._count + 1, time.monotonic()
        if get_world_size() > 1:
            self._store.set(str(get_rank()), str(self._count))

    def close(self):
        self._is_over.set()

    def late_ranks(self):
        """Return the ranks that have not arrived where this one is; none if the store does not answer."""
        try:
            keys = [str(rank) for rank in range(get_world_size())]
            return [int(key) for key in keys if not self._store.check([key]) or int(self._store.get(key)) < self._count]
        except RuntimeError:
            return []

    @contextmanager
    def explaining(self):
        """Within the block the error of a collective is a LostRankError that says who is missing, if that is known.

        The error that torch raises, wherever the program is, when a DataLoader's worker dies is a LostWorkerError.
        """
        try:
            yield
        except RuntimeError as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if reason.startswith("DataLoader worker"):
                raise LostWorkerError(
                    f"rank {get_rank()} lost a process that reads data: {reason.rstrip('. ')}. If nobody killed it, "
                    "the machine's memory is full: lower run.num_workers. Go on with --resume auto"
                ) from None
            if not isinstance(error, dist.DistError) and "gloo" not in reason:
                raise
            late, reason = self.late_ranks(), re.sub(r"^\[\S+\] ", "", reason).split(". ")[0]
            missing = f"rank {', '.join(map(str, late))} did not come to step {self._count}" if late else "an error"
            raise LostRankError(f"rank {get_rank()} lost the other ranks: {missing} ({reason})") from error

    def _watch(self):
        while not self._is_over.wait(min(5, self.timeout_s / 4)):
            if time.monotonic() - self._since > self.timeout_s and (late := self.late_ranks()):
                logging.critical(
                    "rank %d waits for rank %s since %.0f s (run.step_timeout_s); it did not come to step %d of this "
                    "process. Ending the run; go on with --resume auto",
                    get_rank(),
                    ", ".join(map(str, late)),
                    time.monotonic() - self._since,
                    self._count,
                )
                sys.stderr.flush()
                os._exit(1)
