"""Reads the user's annotation files: JSON lines, JSON lists, tables, COCO captions, LLaVA conversations.

A record has the path of an image below one folder, and a caption or a conversation about it. A file in
another format, or with a path that is a URL or leads out of the folder, is rejected as a whole; a record
that cannot be used becomes a Fault, which the dataset counts when it reads it.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from minigpt4.common.image_files import WINDOWS_PATH, find_file
from minigpt4.common.utils import placeholder, printable
from minigpt4.datasets.datasets.record_text import has_text, parse_json, present, read_text
from minigpt4.datasets.datasets.skips import SkipSample

# characters; with Python's default, 131,072, one long text makes a whole file unreadable
csv.field_size_limit(1 << 24)
_EXPECTED = (
    '{"image": path, "caption": text} or {"image": path, "conversations": [{"from": "human", "value": text}, '
    '{"from": "gpt", "value": text}, ..]}'
)


class Record(NamedTuple):
    """One usable record. `where`: its file and line, for messages; `image`: a path relative to the image folder.

    `text` is a caption or a tuple of (question, answer). If the caption is in the .txt file beside the image, `text` is
    the whole item of the annotation file, or None without one.
    """

    where: str
    image: str
    text: str | tuple | dict | None


class Fault(NamedTuple):
    """A record that cannot be used; `reason` is one of skips.REASONS."""

    where: str
    reason: str
    detail: str


def read_records(path: str | Path, folder: str | Path) -> list[Record | Fault]:
    """Return the Records and Faults of an annotation file, in order. `folder`: the image folder.

    Raises OSError, or ValueError that names file and record: if the file is in none of the formats,
    if no record can be used, or if an image path is a URL or leads out of `folder`.
    """
    path, folder = Path(path), Path(folder)
    reader = _READERS.get(path.suffix.lower(), _json)
    if path.stat().st_size and (found := placeholder(path, "records")):
        raise ValueError(f"{path}: {found}")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            records = [
                item if isinstance(item, Fault) else _record(*item, folder)
                for item in reader(file, path)
            ]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cannot be read ({error}); save it as UTF-8 text") from error
    return usable(records, path, _EXPECTED)


def usable(records: list, path: Path, expected: str) -> list:
    """Return the given records and Faults of a file. Raises ValueError if there is none, or none but Faults."""
    if not records:
        raise ValueError(f"{path}: no record to train on; expected {expected}")
    if all(isinstance(record, Fault) for record in records):
        first = f"{records[0].where}: {records[0].detail}"
        raise ValueError(
            f"{path}: none of its {len(records)} records can be used; {first}; expected {expected}"
        )
    return records


def _record(where: str, item: Any, folder: Path) -> Record | Fault:
    """Return the Record or Fault of one decoded item. Raises ValueError for a path that is rejected."""
    try:
        if not isinstance(item, dict):
            raise SkipSample("bad_record", f"is {type(item).__name__}, not a mapping")
        image = _image_path(item, where, folder)
        if not has_text(item) and find_file(folder, text_file(image)):
            return Record(where, image, item)
        return Record(where, image, read_text(item))
    except SkipSample as skipped:
        return Fault(where, skipped.reason, skipped.detail)


def text_file(image: str) -> str:
    """Return the path of the text file beside an image."""
    return os.path.splitext(image)[0] + ".txt"


def _image_path(item: dict, where: str, folder: Path) -> str:
    """Return the normalised path of a record's image relative to `folder`.

    Raises SkipSample if the record has none, ValueError if the path is rejected.
    """
    keys = [key for key in ("image", "images", "file_name") if present(item, key) is not None]
    image = item[keys[0]] if keys else None
    image = image[0] if isinstance(image, list) and len(image) == 1 else image
    if image is None:
        raise SkipSample(
            "no_image", f"'image' is missing (keys: {', '.join(map(str, item)) or 'none'})"
        )
    if not isinstance(image, str) or "\0" in image:
        raise SkipSample("bad_record", f"image is {image!r:.60}; expected the path of one image")
    image, shown = image.strip(), printable(image, 80)
    if "://" in image or image.startswith("data:"):
        raise ValueError(
            f"{where}: '{shown}' is an address; nothing is fetched while training. Download the images and give "
            "their paths"
        )
    if WINDOWS_PATH.match(image):
        wanted = f"write paths that start from the image folder '{folder}'"
        raise ValueError(f"{where}: '{shown}' is an absolute path of Windows; {wanted}")
    if os.path.isabs(image):
        image = _from_folder(image, folder)
    if os.path.normpath(image.replace("\\", "/")).split("/")[0] == "..":
        raise outside(where, shown, folder)
    return os.path.normpath(image)


def _from_folder(image: str, folder: Path) -> str:
    """Return an absolute path relative to `folder`, also if either of them contains symbolic links."""
    if Path(image).is_relative_to(folder.absolute()):
        return str(Path(image).relative_to(folder.absolute()))
    parent, name = os.path.split(image)
    return os.path.join(os.path.relpath(_realpath(parent), _realpath(str(folder))), name)


_realpath = lru_cache(os.path.realpath)  # very many images are in a few folders


def outside(where: str, image: str, folder: Path) -> ValueError:
    """Return the ValueError for an image that is not below `folder`."""
    return ValueError(
        f"{where}: '{image}' leads out of the image folder '{folder}'; write paths without '..' that start from one "
        "folder with all images, links out of it not followed, and name that folder"
    )


# Readers, one per format: each yields (where, decoded item), or a Fault.


def _json_lines(file: TextIO, path: Path) -> Iterator:
    for number, line in enumerate(file, 1):
        where = f"{path.name} line {number}"
        if line.strip():
            try:
                yield where, parse_json(line)
            except SkipSample as skipped:
                yield Fault(where, skipped.reason, skipped.detail)


def _table(file: TextIO, path: Path) -> Iterator:
    rows = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    start = 1  # line number at which the next row starts
    try:
        columns = [name.strip() for name in next(rows, [])]
        if duplicates := [name for name in columns if name and columns.count(name) > 1]:
            raise ValueError(f"{path}: has the column '{duplicates[0]}' twice; keep one of them")
        start = rows.line_num + 1
        for row in rows:
            where, start = f"{path.name} line {rows.line_num}", rows.line_num + 1
            if any(map(str.strip, row[len(columns) :])):
                detail = f"has {len(row)} fields, the first line {len(columns)}; put texts with commas into quotes"
                yield Fault(where, "bad_record", detail)
            elif row:
                yield where, dict(zip(columns, row, strict=False))
    # such as a quote that is never closed, after which the whole rest would be one text
    except csv.Error as error:
        advice = "close every quote, and write those within a text twice"
        raise ValueError(
            f"{path}: the record that begins in line {start} cannot be read ({error}); {advice}"
        ) from error


def _json(file: TextIO, path: Path) -> Iterable:
    try:
        content = json.load(file)
    except (ValueError, RecursionError) as error:
        hint = ""
        if "Extra data" in str(error):
            hint = "; one record a line is read from files called .jsonl"
        elif path.suffix.lower() != ".json":
            hint = f"; only files called {', '.join(_READERS)} are read in another way"
        raise ValueError(f"{path}: not valid JSON ({error}){hint}") from error
    if isinstance(content, list):
        return ((f"{path.name} record {number}", item) for number, item in enumerate(content))
    found = type(content).__name__
    if isinstance(content, dict):
        images, annotations = content.get("images"), content.get("annotations")
        if isinstance(images, list) and isinstance(annotations, list):
            return _coco(images, annotations, path)
        found = f"a mapping with {', '.join(content) or 'nothing'}"
    raise ValueError(
        f"{path}: found {found}; expected a list of {_EXPECTED}, or COCO captions: "
        '{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}'
    )


def _coco(images: list, annotations: list, path: Path) -> Iterator:
    file_names = {}
    for image in images:
        if isinstance(image, dict) and isinstance(image.get("id"), (str, int)):
            image_id, name = image["id"], image.get("file_name")
            if file_names.setdefault(image_id, name) != name:
                raise ValueError(
                    f"{path}: the 'id' {image_id!r} is that of two images, {file_names[image_id]!r} and {name!r}; "
                    "give each file of captions by itself, or number the images anew"
                )
    for number, annotation in enumerate(annotations):
        where = f"{path.name} annotation {number}"
        image_id = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not isinstance(image_id, (str, int)):
            yield Fault(where, "bad_record", "has no 'image_id'")
        elif image_id not in file_names:
            yield Fault(where, "no_image", f"image_id {image_id!r:.60} is not among 'images'")
        else:
            yield where, {**annotation, "image": file_names[image_id]}


# by suffix; files of all others are read by _json
_READERS = {".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _table, ".tsv": _table}
