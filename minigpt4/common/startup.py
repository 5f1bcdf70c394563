"""Timing of the phases until the end of the first training step, and reading ahead of weight files.

Does not import torch: it is imported first, so that the time of later imports counts.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from minigpt4.common.utils import expand_path


class Startup:
    """Wall-clock time, `seconds`, and processor time, `cpu_seconds`, of each phase {name: seconds}, in their order.

    The time of a nested phase does not count for the outer one, so that all phases add up to the total.
    """

    def __init__(self) -> None:
        self.seconds, self.cpu_seconds = {}, {}
        self._phases, self._is_over = ["imports"], False  # the current phases, the innermost last
        self._last = 0.0, 0.0  # (wall-clock, processor) time when a phase was last charged
        # No clock tells when the interpreter started. Until now it has hardly waited, so take its processor time.
        self._wall_at_start = time.perf_counter() - time.process_time()

    def begin(self, name: str) -> None:
        """End the current phase and begin another."""
        self._charge()
        self._phases[-1] = name

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block as a phase of its own."""
        self._charge()
        self._phases.append(name)
        try:
            yield
        finally:
            self._charge()
            self._phases.pop()

    def finish(self) -> None:
        """End the last phase and log how long each phase took; later calls do nothing."""
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
        """Add the time since the last call to the current phase."""
        if self._is_over:
            return
        now = time.perf_counter() - self._wall_at_start, time.process_time()
        phase = self._phases[-1]
        for table, new, old in zip((self.seconds, self.cpu_seconds), now, self._last, strict=True):
            table[phase] = table.get(phase, 0.0) + new - old
        self._last = now


startup = Startup()  # of this process


def read_ahead(paths: Iterable[Path]) -> threading.Thread:
    """Start and return a thread that reads `files_of(paths)` into the page cache; reading releases the GIL."""
    thread = threading.Thread(
        target=_read_files, args=(list(paths),), name="read-ahead", daemon=True
    )
    thread.start()
    return thread


def files_of(paths: Iterable[Path]) -> list[Path]:
    """Return the files of `paths`, for a folder the weight files in it."""
    files = []
    for path in map(expand_path, paths):
        in_folder = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        files += in_folder if path.is_dir() else [path]
    return files


def _read_files(paths: list[Path]) -> None:
    block = bytearray(2**24)
    for path in files_of(paths):
        # an error is left to the code that uses the file
        with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass
