"""Read a benchmark's files; an error message names the file, the place in it, and what was expected."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minigpt4.common.utils import expand_path

KINDS = {dict: "a mapping", list: "a list", str: "text", int: "a number"}


def find_file(path: str | Path, *patterns: str) -> Path:
    """Return the one file that `find_files` finds. Raises FileNotFoundError for none, ValueError for several."""
    files = find_files(path, *patterns)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(
            f"eval_file_path: {len(files)} files in '{path}' fit ({names}); give the one to use"
        )
    return files[0]


def find_files(path: str | Path, *patterns: str) -> list[Path]:
    """Return `path` if it is a file, else the folder's files that match the first pattern with a match, sorted.

    Raises FileNotFoundError if nothing matches.
    """
    path = expand_path(path)
    if path.is_file():
        return [path]
    for pattern in patterns:
        if files := sorted(path.glob(pattern)):
            return files
    found = f"a folder without {' or '.join(patterns)}" if path.is_dir() else "nothing"
    raise FileNotFoundError(f"eval_file_path: no file at '{path}' (found {found})")


def read_text(path: Path) -> str:
    """Return a file's text. Raises ValueError unless it is UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"'{path}' is no UTF-8 text ({error}); is it the file that was meant?"
        ) from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file. Raises ValueError for another kind of file."""
    text = read_text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"'{path}' is no JSON: {error}; was it downloaded whole?") from error


def read_json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield ("file line N", mapping) for each line that is not blank. Raises ValueError unless it is a JSON mapping."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"'{path}' line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{where} is no JSON: {error}; expected a mapping in each line"
            ) from error
        yield where, mapping(row, where)


def mapping(value: Any, where: str) -> dict:
    """Return `value`. Raises ValueError unless it is a mapping; `where` says in the message where it stands."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a mapping, found {kind_of(value)}")
    return value


def field(row: Mapping, key: str, kind: type, where: str) -> Any:
    """Return row[key]. Raises ValueError if it is missing or not of the type `kind`, a key of KINDS."""
    row = mapping(row, where)
    if key not in row:
        raise ValueError(
            f"{where}: '{key}' is missing (there are: {', '.join(map(str, row)) or 'none'})"
        )
    if not isinstance(row[key], kind) or isinstance(row[key], bool):
        raise ValueError(f"{where}: '{key}' is {kind_of(row[key])}; expected {KINDS[kind]}")
    return row[key]


def rows(value: Any, key: str, path: Path) -> Iterator[tuple[str, dict]]:
    """Yield ("file key[N]", mapping) for each entry of value[key], or of `value` itself if it is a list.

    `value` is the content of the JSON file `path`. Raises ValueError for another form.
    """
    listed = value if isinstance(value, list) else field(value, key, list, f"'{path}'")
    for number, row in enumerate(listed):
        where = f"'{path}' {key}[{number}]"
        yield where, mapping(row, where)


def ident(row: Mapping, key: str, where: str) -> str:
    """Return the id row[key], a number or text, as text. Raises ValueError if it is missing or of another type."""
    value = mapping(row, where).get(key)
    if not isinstance(value, (int, str)) or isinstance(value, bool) or value == "":
        found = kind_of(value) if key in row else "nothing"
        raise ValueError(f"{where}: '{key}' is {found}; expected a number or text")
    return str(value)


def group_of(row: Mapping, key: str, where: str) -> str:
    """Return the group row[key] as `ident`, but "" if it is missing, null or empty. Raises ValueError."""
    return "" if row.get(key) in (None, "") else ident(row, key, where)


def kind_of(value: Any) -> str:
    """Return the type of a value in words, for an error message."""
    return "null" if value is None else KINDS.get(type(value), type(value).__name__)
