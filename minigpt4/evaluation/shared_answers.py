"""The answers to a benchmark, in a folder: a part of each rank while they are at work, one file at the end."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from minigpt4.common.lock import locked
from minigpt4.evaluation.answer_file import AnswerFile, read_lines, write_whole


class SharedAnswers:
    """`answers.jsonl`: {"id", "answer"} or {"id", "error"} a line, in the order of the items.

    `settings` are all that an answer depends on; they are kept beside it.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.path = folder, folder / "answers.jsonl"
        self.settings = dict(settings)

    def locked(self) -> AbstractContextManager:
        """Keep other programs from the folder within a `with` block. Raises OSError if one is at work there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return locked(self.folder)

    def collect(self, ids: Sequence[str]) -> dict[str, dict]:
        """Merge the parts, of a call that was interrupted too, into the file; return its lines by id.

        An answer takes the place of an error. Raises ValueError for answers of other settings or to other items, and
        for a file of another kind; nothing is lost then.
        """
        parts = sorted(self.folder.glob("answers.part*.jsonl"))
        found: dict[str, tuple[bytes, dict]] = {}
        for path in [self.path, *parts]:
            AnswerFile(path, "id", self.settings)  # refuses answers of other settings
            for text, line in read_lines(path, "id").items():
                if "answer" in line or ("error" in line and line["id"] not in found):
                    found[line["id"]] = (text, line)
        if strangers := sorted(set(found) - set(ids)):
            what = f"{len(strangers)} answers to what is no item now, first '{strangers[0]}'"
            raise ValueError(f"--output: '{self.path}' has {what}; give another --output")

        AnswerFile(self.path, "id", self.settings).begin(again=set())
        ordered = [found[name] for name in ids if name in found]
        write_whole(self.path, b"".join(text + b"\n" for text, _ in ordered))
        for path in parts:
            path.unlink()
            path.with_name(f"{path.name}.settings.json").unlink(missing_ok=True)
        return {line["id"]: line for _, line in ordered}

    def add(self, rank: int, lines: Iterable[dict]) -> None:
        """Write the lines to the part of a rank, each as soon as it is there."""
        part = AnswerFile(self.folder / f"answers.part{rank}.jsonl", "id", self.settings)
        part.begin(again=set())
        for line in lines:
            part.add(line)
