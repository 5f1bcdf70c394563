"""What an official annotation says of one image, in one form for all formats, and the loop over the rows of a file."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4.common.utils import placeholder, read_json
from minigpt4.datasets.datasets.annotations import Fault, usable
from minigpt4.datasets.datasets.record_text import whole_text
from minigpt4.datasets.datasets.skips import SkipSample

GUIDE = "docs/instruction_data.md"


class Spot(NamedTuple):
    """Where a record stands: a file, and the number from 0, or the id, of the row in it."""

    file: str
    row: int | str

    def __str__(self) -> str:
        return f"{self.file} record {self.row}"


class Box(NamedTuple):
    """A box in pixels of an image of `size` (width, height), None where the file does not say it."""

    left: float
    top: float
    width: float
    height: float
    size: tuple[int, int] | None = None


class Example(NamedTuple):
    """One usable record: of `questions` and of `answers` one each is drawn, or all are the turns of a dialogue.

    `image` is relative to an image folder, None for text alone; a question "" leaves the instruction to the pool.
    """

    where: Spot
    image: str | None
    questions: tuple[str | Box, ...]
    answers: tuple[str | Box, ...]
    image_id: int | str | None = None
    question_id: int | str | None = None


Records = list[Example | Fault]


class Format(NamedTuple):
    """A JSON file of rows: a list, or a list or {id: row} below `key`. `make` gives the Examples of a row.

    `expected`: a row, as messages show it. {id: row} at the root: `key` is "".
    """

    make: Callable[[dict, Spot], Iterable[Example]]
    expected: str
    key: str = "annotations"


def read_rows(form: Format, paths: Sequence[Path]) -> Records:
    """Return the records of annotation files of one format, in their order; a row that cannot be used is a Fault.

    Raises OSError, or ValueError that names the file: not JSON, of another form, without a usable row, given twice.
    """
    if twice := [path for number, path in enumerate(paths) if path in paths[:number]]:
        raise ValueError(f"{twice[0]}: the file is given twice; its records would count double")
    records, asked = [], {}
    for path in paths:
        found: Records = []
        for row_id, row in _rows(json_of(path), form, path):
            spot = Spot(path.name, row_id)
            try:
                if not isinstance(row, dict):
                    raise SkipSample("bad_record", f"is {type(row).__name__}, not a mapping")
                found += [_once(example, asked) for example in form.make(row, spot)]
            except SkipSample as skipped:
                found.append(Fault(str(spot), skipped.reason, skipped.detail))
        records += usable(found, path, form.expected)
    return records


def _once(example: Example, asked: dict[int | str, Spot]) -> Example:
    """Return an example, noted in `asked` by its question's id. Raises SkipSample for an id that is there already."""
    first = example.where
    if example.question_id is not None:
        first = asked.setdefault(example.question_id, example.where)
    if first is not example.where:
        raise SkipSample(
            "bad_record", f"question_id {example.question_id} is there twice; first: {first}"
        )
    return example


def json_of(path: Path) -> Any:
    """Return what a JSON file holds. Raises OSError, ValueError that names it."""
    if found := placeholder(path, "annotations"):
        raise ValueError(f"{path}: {found}")
    return read_json(path)


def _rows(content: Any, form: Format, path: Path) -> Iterator[tuple[int | str, Any]]:
    """Yield (number or id, row) of a file's rows. Raises ValueError for a file of another form."""
    rows = content.get(form.key) if isinstance(content, dict) and form.key else content
    if isinstance(rows, list):
        yield from enumerate(rows)
    elif isinstance(rows, dict) and not form.key:
        yield from rows.items()
    else:
        keys = ", ".join(map(str, content)) if isinstance(content, dict) else ""
        found = (
            f"a mapping with {keys or 'nothing'}"
            if isinstance(content, dict)
            else type(content).__name__
        )
        raise ValueError(f"{path}: found {found}; expected a list of {form.expected}")


def text_of(row: dict, key: str) -> str:
    """Return the text row[key] as it stands. Raises SkipSample where it is missing, no text, or blank."""
    value = _there(row, key)
    if not isinstance(value, str):
        raise SkipSample("bad_record", f"'{key}' is {type(value).__name__}, not text")
    if not value.strip():
        raise SkipSample("bad_caption", f"'{key}' is empty")
    return whole_text(value)


def texts_of(row: dict, key: str) -> tuple[str, ...]:
    """Return the list of texts row[key], or the one text. Raises SkipSample as `text_of`, and for an empty list."""
    value = _there(row, key)
    if isinstance(value, str):
        return (text_of(row, key),)
    if not isinstance(value, list) or not value:
        found = "an empty list" if isinstance(value, list) else type(value).__name__
        raise SkipSample("bad_record", f"'{key}' is {found}; expected a list of texts")
    return tuple(text_of({key: text}, key) for text in value)


def id_of(row: dict, key: str) -> int | str:
    """Return the id row[key], a number or text. Raises SkipSample."""
    value = _there(row, key)
    if not isinstance(value, (int, str)) or isinstance(value, bool) or value == "":
        raise SkipSample("bad_record", f"'{key}' is {value!r:.60}; expected a number or text")
    return value


def _there(row: dict, key: str) -> Any:
    if key not in row:
        raise SkipSample(
            "bad_record", f"'{key}' is missing (there are: {', '.join(map(str, row)) or 'none'})"
        )
    return row[key]
