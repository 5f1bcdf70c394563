"""The answers to a benchmark, in a folder: one part file per rank while it runs, merged into one file at the end."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from minigpt4.common.lock import locked
from minigpt4.evaluation.answer_file import AnswerFile, read_lines, write_whole


class SharedAnswers:
    """`answers.jsonl`: one {"id", "answer"} or {"id", "error"} per line, in the order of the items.

    `settings` are everything that an answer depends on; they are stored beside the file.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.path = folder, folder / "answers.jsonl"
        self.settings = dict(settings)

    def locked(self) -> AbstractContextManager:
        """Lock the folder against other programs within a `with` block. Raises OSError if one is using it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return locked(self.folder)

    def collect(self, ids: Sequence[str]) -> dict[str, dict]:
        """Merge all part files, those of an interrupted call included, into the file; return its lines by id.

        An answer replaces an error. Raises ValueError, without changing a file, for answers of other settings or to
        other items and for a file of another kind.
        """
        parts = sorted(self.folder.glob("answers.part*.jsonl"))
        found: dict[str, tuple[bytes, dict]] = {}
        for path in [self.path, *parts]:
            AnswerFile(path, "id", self.settings)  # refuses answers of other settings
            for raw, line in read_lines(path, "id").items():
                if "answer" in line or ("error" in line and line["id"] not in found):
                    found[line["id"]] = (raw, line)
        if unknown := sorted(set(found) - set(ids)):
            what = f"{len(unknown)} answers to what is no item now, first '{unknown[0]}'"
            raise ValueError(f"--output: '{self.path}' has {what}; give another --output")

        AnswerFile(self.path, "id", self.settings).begin(again=set())
        ordered = [found[name] for name in ids if name in found]
        write_whole(self.path, b"".join(raw + b"\n" for raw, _ in ordered))
        for path in parts:
            path.unlink()
            path.with_name(f"{path.name}.settings.json").unlink(missing_ok=True)
        return {line["id"]: line for _, line in ordered}

    def add(self, rank: int, lines: Iterable[dict]) -> None:
        """Append the lines to the part file of a rank, each as soon as it is available."""
        part = AnswerFile(self.folder / f"answers.part{rank}.jsonl", "id", self.settings)
        part.begin(again=set())
        for line in lines:
            part.add(line)
