"""The answers to a benchmark on disk: JSON lines, of one rank or several, of one call or several."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt4.evaluation.benchmarks.files import read_text

EXPECTED = 'expected {"id": text, "answer" or "error": text}'


class AnswerFile:
    """`answers.jsonl` of a folder, {"id", "answer"} or {"id", "error"} a line, in the order of the items.

    While ranks are at work each has a part of its own. `collect` merges what is there, of a call that ended early too.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "answers.jsonl"

    def collect(self, ids: Sequence[str], settings: Mapping[str, Any]) -> dict[str, dict]:
        """Merge the parts into the file and return its lines by id; errors are kept until there is an answer.

        `settings` are all that an answer depends on; they are kept in `answered_with.json`. Raises ValueError for
        answers of other settings or to other items, and for a file of another kind; nothing is lost then.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        parts = sorted(self.path.parent.glob("answers.part*.jsonl"))
        lines: dict[str, dict] = {}
        for path in [self.path, *parts]:
            lines |= {line["id"]: line for line in read_lines(path) if "answer" in line or line["id"] not in lines}
        self._check_settings(settings, is_new=not lines)
        strangers = [name for name in lines if name not in set(ids)] if lines else []
        if strangers:
            found = f"{len(strangers)} answers to what is no item now, first '{strangers[0]}'"
            raise ValueError(f"'{self.path}' has {found}; the data has changed: give another --output")
        if lines:
            self._write(lines[name] for name in ids if name in lines)
        for path in parts:
            path.unlink()
        return lines

    def append(self, rank: int, lines: Iterable[dict]) -> None:
        """Write the lines to the part of a rank, each as soon as it is there."""
        with open(self.path.with_name(f"answers.part{rank}.jsonl"), "a", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()

    def _write(self, lines: Iterable[dict]) -> None:
        # at once, so that a kill leaves the old file or the new one
        fresh = self.path.with_name("answers.new")
        fresh.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        fresh.replace(self.path)

    def _check_settings(self, settings: Mapping[str, Any], is_new: bool) -> None:
        path = self.path.with_name("answered_with.json")
        if is_new or not path.is_file():
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        keys = dict.fromkeys([*before, *settings])
        changed = [key for key in keys if before.get(key) != settings.get(key)]
        if changed:
            listed = "; ".join(f"{key}: {before.get(key)} -> {settings.get(key)}" for key in changed)
            advice = "give another --output, or remove the folder"
            raise ValueError(f"'{self.path}' was answered with other settings ({listed}); {advice}")


def read_lines(path: Path) -> list[dict]:
    """Return the lines of an answer file, [] without one; a last line that was cut short is left out.

    Raises ValueError, which names the line, for a file of another kind.
    """
    if not path.is_file():
        return []
    # not splitlines(): an answer may hold a line separator of Unicode
    *whole, rest = read_text(path).split("\n")
    lines = []
    for number, text in enumerate(whole, start=1):
        where = f"'{path}' line {number}"
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON ({error}); {EXPECTED}; mend or remove the line") from error
        is_line = isinstance(line, dict) and isinstance(line.get("id"), str)
        if not is_line or not isinstance(line.get("answer", line.get("error")), str):
            raise ValueError(f"{where} is no answer; {EXPECTED}; mend or remove the line")
        lines.append(line)
    if rest and not lines and not rest.startswith('{"id"'):
        raise ValueError(f"'{path}' is no answer file; {EXPECTED}")
    return lines
