"""The log files of a run, `log.txt` and `metrics.jsonl`; trackers also get the records of the latter."""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt4.common.dist_utils import is_main_process


class RunLog:
    """The log files of a run, written by rank 0; `trackers`, if any, get the records of `metrics.jsonl`.

    With a full disk or a lost folder lines are lost, with one warning, and training goes on.
    """

    def __init__(self, folder: Path, trackers: Any = None) -> None:
        self.folder, self._has_warned = folder, False
        self._trackers = trackers

    def config(self, plain: dict[str, Any]) -> None:
        """Append the whole configuration to `log.txt`, as one pretty-printed JSON object."""
        self._append("log.txt", json.dumps(plain, indent=4))

    def epoch(self, stats: dict[str, float]) -> None:
        """Append the metrics of an epoch to `log.txt`, as one JSON line."""
        self._append("log.txt", _json(stats))

    def has_epoch(self, stats: dict[str, float]) -> bool:
        """Return whether `log.txt` has a line that begins with these metrics of an epoch."""
        path = self.folder / "log.txt"
        if not path.is_file():
            return False
        beginning = _json(stats).removesuffix("}")
        return f"\n{beginning}" in path.read_text(encoding="utf-8", errors="replace")

    def steps(self, records: list[dict[str, Any]]) -> None:
        """Append the records of steps to `metrics.jsonl`, one JSON line each, and send them to the trackers."""
        if records:
            self._append("metrics.jsonl", "\n".join(map(_json, records)))
        if self._trackers:
            for record in records:
                self._trackers.log(record)

    def validation(self, record: dict[str, Any]) -> None:
        """Append the record of one validation to `metrics.jsonl`; its key "validation" is the name of the split."""
        self.steps([record])

    def close(self) -> None:
        """Close the trackers. The files need no closing: each append opens them."""
        if self._trackers:
            self._trackers.close()

    def _append(self, name: str, text: str) -> None:
        if not is_main_process():
            return
        with self._errors_logged(self.folder / name), open(self.folder / name, "ab+") as file:
            # a run that was killed may have left an incomplete line: start a new one
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                text = text if file.read(1) == b"\n" else f"\n{text}"
            file.write(f"{text}\n".encode())

    @contextmanager
    def _errors_logged(self, path: Path) -> Iterator[None]:
        """Within the block, an OSError is only a warning, logged once."""
        try:
            yield
        except OSError as error:
            if not self._has_warned:
                logging.warning("cannot write %s (%s); training goes on without it", path, error)
            self._has_warned = True


def _json(values: Mapping[str, Any]) -> str:
    """Return values as one line of JSON, which has no nan and no infinity: they become null."""
    finite = {}
    for key, value in values.items():
        is_number = not isinstance(value, float) or math.isfinite(value)
        finite[key] = value if is_number else None
    return json.dumps(finite)
