"""A watch over ranks that wait for each other: a late or lost rank is named, and ends the run."""

import itertools
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from minigpt4.common.dist_utils import get_rank, get_world_size
from minigpt4.common.utils import first_line


class LostRankError(OSError):
    """Another process of the run is gone."""


class LostWorkerError(OSError):
    """A DataLoader worker of this process is gone."""


class StepTimeout:
    """Ends the run if a rank keeps the others waiting for more than `timeout_s` seconds.

    Each rank writes the number of its step to the process group's store, and a thread of it writes a heartbeat there: a
    process that is stopped within a collective has arrived at the step, but its heartbeat stands still. The thread also
    looks for late ranks. Contract: within `watching`, call `arrived` before every collective of a training step.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s, self._count = timeout_s, 0
        self._since, self._store = time.monotonic(), None
        self._beats = {}  # {rank: (its last heartbeat, when that was first seen)}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block, late ranks end the run, and torch's errors name the process that is lost.

        An error of a collective becomes LostRankError, one of a DataLoader whose worker is gone LostWorkerError.
        """
        # The store works even while a collective hangs.
        is_over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(is_over,), daemon=True)
        self._count, self._since = 0, time.monotonic()
        self._beats.clear()
        if get_world_size() > 1:
            self._store = dist.PrefixStore("steps", dist.distributed_c10d._get_default_store())
            self._store.set(f"beat {get_rank()}", "0")
            self._store.set(f"step {get_rank()}", "0")
            watch.start()
        try:
            with _worker_errors_unified():
                yield
        except RuntimeError as error:
            reason = first_line(error)
            if reason.startswith("DataLoader worker"):
                raise LostWorkerError(
                    f"rank {get_rank()} lost a process that reads data: {reason.rstrip('. ')}. If nobody killed it, "
                    "the machine's memory is full: lower run.num_workers. Resume with --resume auto"
                ) from None
            if not isinstance(error, dist.DistError) and "gloo" not in reason:
                raise
            late, reason = self.late_ranks(), re.sub(r"^\[\S+\] ", "", reason).split(". ")[0]
            missing = f"rank {late} did not come to step {self._count}" if late else "an error"
            raise LostRankError(
                f"rank {get_rank()} lost the other ranks: {missing} ({reason})"
            ) from error
        finally:
            is_over.set()
            if watch.is_alive():  # a process that exits during a request to the store may abort
                watch.join(10)

    def arrived(self) -> None:
        """Note that this rank is about to wait for the others."""
        self._count, self._since = self._count + 1, time.monotonic()
        if self._store is not None:
            # without torchrun, which hosts the store, the ranks still save and end
            with suppress(RuntimeError):
                self._store.set(f"step {get_rank()}", str(self._count))

    def late_ranks(self) -> str:
        """Return the late ranks as text, "1, 3": behind this rank's step, or without heartbeat. "": none, or no store."""
        try:
            return ", ".join(str(rank) for rank in range(get_world_size()) if self._is_late(rank))
        except RuntimeError:
            return ""

    def _is_late(self, rank: int) -> bool:
        store, now = self._store, time.monotonic()
        if not store.check([f"beat {rank}", f"step {rank}"]):
            return True
        beat = store.get(f"beat {rank}")
        if rank not in self._beats or self._beats[rank][0] != beat:
            self._beats[rank] = beat, now
        _, last_beat = self._beats[rank]
        return int(store.get(f"step {rank}")) < self._count or now - last_beat > self.timeout_s

    def _watch(self, is_over: threading.Event) -> None:
        pause, beats = min(5, self.timeout_s / 4), itertools.count(1)
        while not is_over.wait(pause):
            with suppress(RuntimeError):  # the store is gone: the collective that waits will fail
                self._store.set(f"beat {get_rank()}", str(next(beats)))
            waited = time.monotonic() - self._since
            late = self.late_ranks() if waited > pause else ""
            if late and waited > self.timeout_s:
                logging.critical(
                    f"rank {get_rank()} has waited {waited:.0f} s for rank {late} (run.step_timeout_s); it "
                    f"did not make step {self._count} of this process. Ending the run; resume with --resume auto"
                )
                sys.stderr.flush()
                os._exit(1)


@contextmanager
def _worker_errors_unified() -> Iterator[None]:
    """Within the block, losing a worker while a tensor is fetched from it is a RuntimeError, as torch's own error is."""
    try:
        yield
    except (OSError, EOFError) as error:
        last_frame = traceback.extract_tb(error.__traceback__)[-1]
        if "multiprocessing" not in Path(last_frame.filename).parts:
            raise
        time.sleep(2)  # time for torch's signal handler to raise its own error, which says more
        raise RuntimeError(f"DataLoader worker is gone ({error})") from error
