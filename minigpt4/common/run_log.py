"""What a run writes while it trains: `log.txt`, `metrics.jsonl`; trackers get the latter, too."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt4.common.dist_utils import is_main_process


class RunLog:
    """The text files of a run, written by rank 0; `trackers`, if any, get the lines of `metrics.jsonl`.

    A full disk or a lost folder costs lines and one warning, never the training.
    """

    def __init__(self, folder: Path, trackers: Any = None) -> None:
        self.folder, self._has_warned = folder, False
        self._trackers = trackers

    def config(self, plain: dict[str, Any]) -> None:
        """Append the whole configuration to `log.txt`, as one pretty-printed JSON object."""
        self._append("log.txt", json.dumps(plain, indent=4))

    def epoch(self, stats: dict[str, float]) -> None:
        """Append the numbers of an epoch to `log.txt`, as one JSON line."""
        self._append("log.txt", json.dumps(stats))

    def has_epoch(self, stats: dict[str, float]) -> bool:
        """Return whether `log.txt` has a line that begins with these numbers of an epoch."""
        path = self.folder / "log.txt"
        return path.is_file() and f"\n{json.dumps(stats)[:-1]}" in path.read_text(
            encoding="utf-8", errors="replace"
        )

    def steps(self, records: list[dict[str, Any]]) -> None:
        """Append one JSON line a step to `metrics.jsonl`."""
        if records:
            self._append("metrics.jsonl", "\n".join(json.dumps(record) for record in records))
        for record in records if self._trackers else ():
            self._trackers.log(record)

    def validation(self, record: dict[str, Any]) -> None:
        """Append the line of one validation to `metrics.jsonl`; it has the key "validation", the split's name."""
        self.steps([record])

    def close(self) -> None:
        """Close the trackers; the files are opened for each line."""
        if self._trackers:
            self._trackers.close()

    def _append(self, name: str, text: str) -> None:
        if not is_main_process():
            return
        with self._losing_lines(self.folder / name), open(self.folder / name, "ab+") as file:
            if file.seek(0, os.SEEK_END):  # a run that was killed may have left half a line
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else f"\n{text}"
            file.write(f"{text}\n".encode())

    @contextmanager
    def _losing_lines(self, path: Path) -> Iterator[None]:
        """Within the block, what cannot be written is lost; that is said once."""
        try:
            yield
        except OSError as error:
            if not self._has_warned:
                logging.warning("cannot write %s (%s); training goes on without it", path, error)
            self._has_warned = True
