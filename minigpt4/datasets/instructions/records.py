"""The form of a record that all official formats are converted to, and the loop over the rows of a file.

A dataset's fingerprint, which a resume compares, hashes the repr of its records: do not rename Spot, Box, Example, Fault
or their fields.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4.common.utils import placeholder, read_json, whole_text
from minigpt4.datasets.datasets.annotations import Fault, usable
from minigpt4.datasets.datasets.skips import SkipSample

GUIDE = "docs/instruction_data.md"


class Spot(NamedTuple):
    """The location of a record: a file, and the index (from 0) or ID of the row in it."""

    file: str
    row: int | str

    def __str__(self) -> str:
        return f"{self.file} record {self.row}"


class Box(NamedTuple):
    """A box in pixels. `size`: (width, height) of its image, None if the annotation file does not contain it."""

    left: float
    top: float
    width: float
    height: float
    size: tuple[int, int] | None = None


class Example(NamedTuple):
    """One usable record: alternative `questions` and `answers`, of which one each is drawn; or the turns of a dialogue.

    `image` is relative to an image folder, None for text alone. With the question "" the instruction is a template of
    the pool alone.
    """

    where: Spot
    image: str | None
    questions: tuple[str | Box, ...]
    answers: tuple[str | Box, ...]
    image_id: int | str | None = None
    question_id: int | str | None = None


Records = list[Example | Fault]


class Format(NamedTuple):
    """A format of JSON files: a list of rows, at the root or under `key`; with `key` "", also {id: row} at the root.

    `make` returns the Examples of a row. `expected`: a row as messages show it.
    """

    make: Callable[[dict, Spot], Iterable[Example]]
    expected: str
    key: str = "annotations"


def read_rows(form: Format, paths: Sequence[Path]) -> Records:
    """Return the records of annotation files of one format, in order; a row that cannot be used is a Fault.

    Raises OSError, or ValueError that names a file that is not JSON, has another form or no usable row, or is given twice.
    """
    if duplicates := [path for number, path in enumerate(paths) if path in paths[:number]]:
        raise ValueError(
            f"{duplicates[0]}: the file is given twice; its records would count double"
        )
    records, seen_questions = [], {}
    for path in paths:
        found: Records = []
        for row_id, row in _rows(json_of(path), form, path):
            spot = Spot(path.name, row_id)
            try:
                if not isinstance(row, dict):
                    raise SkipSample("bad_record", f"is {type(row).__name__}, not a mapping")
                found += [_unique(example, seen_questions) for example in form.make(row, spot)]
            except SkipSample as skipped:
                found.append(Fault(str(spot), skipped.reason, skipped.detail))
        records += usable(found, path, form.expected)
    return records


def _unique(example: Example, seen: dict[int | str, Spot]) -> Example:
    """Return an example and add its question ID to `seen`. Raises SkipSample if the ID is there already."""
    if example.question_id is None:
        return example
    first = seen.setdefault(example.question_id, example.where)
    if first is not example.where:
        raise SkipSample(
            "bad_record", f"question_id {example.question_id} is there twice; first: {first}"
        )
    return example


def json_of(path: Path) -> Any:
    """Return the content of a JSON file. Raises OSError, or ValueError that names the file."""
    if found := placeholder(path, "annotations"):
        raise ValueError(f"{path}: {found}")
    return read_json(path)


def _rows(content: Any, form: Format, path: Path) -> Iterator[tuple[int | str, Any]]:
    """Yield (index or ID, row) for each row of a file. Raises ValueError if the file has another form."""
    rows = content.get(form.key) if isinstance(content, dict) and form.key else content
    if isinstance(rows, list):
        yield from enumerate(rows)
    elif isinstance(rows, dict) and not form.key:
        yield from rows.items()
    else:
        found = type(content).__name__
        if isinstance(content, dict):
            found = f"a mapping with {', '.join(map(str, content)) or 'nothing'}"
        raise ValueError(f"{path}: found {found}; expected a list of {form.expected}")


def text_of(row: dict, key: str) -> str:
    """Return the text row[key] unchanged, but for lone surrogates. Raises SkipSample if it is missing, not text, or blank."""
    value = _required(row, key)
    if not isinstance(value, str):
        raise SkipSample("bad_record", f"'{key}' is {type(value).__name__}, not text")
    if not value.strip():
        raise SkipSample("bad_caption", f"'{key}' is empty")
    return whole_text(value)


def texts_of(row: dict, key: str) -> tuple[str, ...]:
    """Return the texts of row[key], a list or a single text. Raises SkipSample as `text_of`, and for an empty list."""
    value = _required(row, key)
    if isinstance(value, str):
        return (text_of(row, key),)
    if not isinstance(value, list) or not value:
        found = "an empty list" if isinstance(value, list) else type(value).__name__
        raise SkipSample("bad_record", f"'{key}' is {found}; expected a list of texts")
    return tuple(text_of({key: text}, key) for text in value)


def id_of(row: dict, key: str) -> int | str:
    """Return the ID row[key], a number or text. Raises SkipSample."""
    value = _required(row, key)
    if not isinstance(value, (int, str)) or isinstance(value, bool) or value == "":
        raise SkipSample("bad_record", f"'{key}' is {value!r:.60}; expected a number or text")
    return value


def _required(row: dict, key: str) -> Any:
    if key not in row:
        raise SkipSample(
            "bad_record", f"'{key}' is missing (there are: {', '.join(map(str, row)) or 'none'})"
        )
    return row[key]
