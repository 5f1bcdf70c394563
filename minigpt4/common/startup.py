"""Where the time goes until the first training step is done; weight files read ahead.

Loads no torch: it is imported first, so that what follows is counted.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from minigpt4.common.utils import expand_path


class Startup:
    """Seconds of each phase, in the order in which they began: `seconds[name]`, and `cpu_seconds`.

    A phase inside another counts for itself alone, so that all of them together are the whole.
    """

    def __init__(self) -> None:
        self.seconds, self.cpu_seconds = {}, {}
        self._open, self._is_over = ["imports"], False
        self._last = 0.0, 0.0  # when something was charged: by the wall clock, by the processor's
        # No clock says when an interpreter started. Until here it has computed and hardly waited.
        self._wall_at_start = time.perf_counter() - time.process_time()

    def begin(self, name: str) -> None:
        """End the current phase and begin another."""
        self._charge()
        self._open[-1] = name

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block as a phase of its own."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def finish(self) -> None:
        """End the last phase and log how long each one took; later calls do nothing."""
        if not self._is_over:
            self._charge()
            self._is_over = True
            parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
            logging.info(
                "Start-up: %.1f s to the end of the first step (%s)",
                sum(self.seconds.values()),
                parts,
            )

    def _charge(self) -> None:
        if self._is_over:
            return
        now = time.perf_counter() - self._wall_at_start, time.process_time()
        for table, new, old in zip((self.seconds, self.cpu_seconds), now, self._last, strict=True):
            table[self._open[-1]] = table.get(self._open[-1], 0.0) + new - old
        self._last = now


startup = Startup()  # of this process


def read_ahead(paths: Iterable[Path]) -> threading.Thread:
    """Return a thread that reads `files_of(paths)` into the page cache, Python left to others."""
    thread = threading.Thread(
        target=_read_files, args=(list(paths),), name="read-ahead", daemon=True
    )
    thread.start()
    return thread


def files_of(paths: Iterable[Path]) -> list[Path]:
    """Return the files of `paths`; for a folder those of weights in it."""
    files = []
    for path in map(expand_path, paths):
        in_folder = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        files += in_folder if path.is_dir() else [path]
    return files


def _read_files(paths: list[Path]) -> None:
    block = bytearray(2**24)
    for path in files_of(paths):
        # its user complains
        with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass
