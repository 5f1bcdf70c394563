"""Readers of boxes with descriptions: the REFER files of RefCOCO, RefCOCO+ and RefCOCOg, and Visual Genome's regions."""

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from minigpt4.datasets.datasets.annotations import Fault
from minigpt4.datasets.datasets.skips import SkipSample
from minigpt4.datasets.instructions.records import (
    Box,
    Example,
    Records,
    Spot,
    id_of,
    json_of,
    text_of,
    usable,
)

MAX_AREA = 16384  # pixels; the release trains only on regions of Visual Genome that are smaller
_REFS = '[{"ref_id", "ann_id", "image_id", "split", "sentences": [{"raw": text}]}]'
_INSTANCES = (
    '{"images": [{"id", ..}], "annotations": [{"id", "image_id", "bbox": [x, y, width, height]}]}'
)
_REGIONS = '[{"id", "regions": [{"region_id", "phrase", "x", "y", "width", "height"}]}]'
_IMAGES = '[{"image_id", "url", "width", "height"}]'


def read_refs(paths: Sequence[Path]) -> Records:
    """Return the records of `refs(<splitBy>).p` and `instances.json`, with the split "train" alone.

    The questions are a ref's sentences, the answer is its box. Raises OSError, or ValueError that names the file.
    """
    refs_path, instances_path = paths
    refs, instances = _unpickled(refs_path), json_of(instances_path)
    if not isinstance(refs, list):
        raise ValueError(f"{refs_path}: found {type(refs).__name__}; expected {_REFS}")
    if not isinstance(instances, dict) or not {"images", "annotations"} <= instances.keys():
        found = ", ".join(instances) if isinstance(instances, dict) else type(instances).__name__
        raise ValueError(f"{instances_path}: found {found}; expected {_INSTANCES}")
    images = _by_id(instances["images"], "id", instances_path, _INSTANCES)
    boxes = _by_id(instances["annotations"], "id", instances_path, _INSTANCES)
    records: Records = []
    for number, ref in enumerate(refs):
        spot = Spot(refs_path.name, number)
        if isinstance(ref, dict) and ref.get("split", "train") != "train":
            continue
        try:
            records.append(_ref(ref, spot, boxes, images))
        except SkipSample as skipped:
            records.append(Fault(str(spot), skipped.reason, skipped.detail))
    return usable(records, refs_path, _REFS)


def _ref(ref: Any, spot: Spot, boxes: dict, images: dict) -> Example:
    if not isinstance(ref, dict):
        raise SkipSample("bad_record", f"is {type(ref).__name__}, not a mapping")
    ann_id, image_id = id_of(ref, "ann_id"), id_of(ref, "image_id")
    if ann_id not in boxes:
        raise SkipSample(
            "bad_record", f"ann_id {ann_id} is not among the annotations of instances.json"
        )
    if image_id not in images:
        raise SkipSample(
            "no_image", f"image_id {image_id} is not among the images of instances.json"
        )
    if boxes[ann_id].get("image_id", image_id) != image_id:
        other = boxes[ann_id]["image_id"]
        raise SkipSample(
            "bad_record",
            f"is about image {image_id}, its box (ann_id {ann_id}) about image {other}",
        )
    sentences = ref.get("sentences")
    if not isinstance(sentences, list) or not all(
        isinstance(sentence, dict) for sentence in sentences
    ):
        raise SkipSample(
            "bad_record", f"'sentences' is {sentences!r:.60}; expected a list of mappings"
        )
    texts = tuple(text_of(sentence, "raw") for sentence in sentences)
    if not texts:
        raise SkipSample("no_caption", "'sentences' is empty")
    box = _box(boxes[ann_id].get("bbox"), images[image_id])
    number = f"{image_id:012d}" if isinstance(image_id, int) else image_id
    return Example(spot, f"COCO_train2014_{number}.jpg", texts, (box,), image_id)


def read_genome(paths: Sequence[Path]) -> Records:
    """Return the records of Visual Genome's `region_descriptions.json` and `image_data.json`, of small regions alone.

    The question is a region's phrase, the answer its box. Raises OSError, or ValueError that names the file.
    """
    regions_path, images_path = paths
    images = _by_id(json_of(images_path), "image_id", images_path, _IMAGES)
    content = json_of(regions_path)
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise ValueError(f"{regions_path}: found {type(content).__name__}; expected {_REGIONS}")
    records: Records = []
    for entry in content:
        regions = entry.get("regions") or ()
        if not isinstance(regions, (list, tuple)):
            detail = f"'regions' is {type(regions).__name__}; expected a list"
            where = f"{regions_path.name} records of image {entry.get('id')}"
            records.append(Fault(where, "bad_record", detail))
            continue
        for number, region in enumerate(regions):
            region_id = region.get("region_id", number) if isinstance(region, dict) else number
            spot = Spot(regions_path.name, f"{region_id} of image {entry.get('id')}")
            try:
                records += _region(region, entry.get("id"), spot, images)
            except SkipSample as skipped:
                records.append(Fault(str(spot), skipped.reason, skipped.detail))
    return usable(records, regions_path, _REGIONS)


def _region(region: Any, image_id: Any, spot: Spot, images: dict) -> list[Example]:
    if not isinstance(region, dict):
        raise SkipSample("bad_record", f"is {type(region).__name__}, not a mapping")
    if image_id not in images:
        raise SkipSample("no_image", f"image {image_id!r:.40} is not in image_data.json")
    image = images[image_id]
    box = _box([region.get(key) for key in ("x", "y", "width", "height")], image)
    if box.width * box.height >= MAX_AREA:
        return []
    # the image https://host/rak248/VG_100K_2/2.jpg is the file VG_100K_2/2.jpg
    file = "/".join(urlparse(text_of(image, "url")).path.split("/")[-2:])
    return [Example(spot, file, (text_of(region, "phrase"),), (box,), image_id)]


def _box(numbers: Any, image: dict) -> Box:
    """Return the Box of [x, y, width, height] in the image of a row. Raises SkipSample if it is invalid or empty."""
    is_box = isinstance(numbers, (list, tuple)) and len(numbers) == 4
    if not is_box or not all(
        type(number) in (int, float) and math.isfinite(number) for number in numbers
    ):
        raise SkipSample(
            "bad_record", f"the box is {numbers!r:.60}; expected four numbers: x, y, width, height"
        )
    if numbers[2] <= 0 or numbers[3] <= 0:
        raise SkipSample(
            "bad_record", f"the box {list(numbers)} is empty; expected a width and a height above 0"
        )
    width, height = image.get("width"), image.get("height")
    has_size = all(type(length) is int and length > 0 for length in (width, height))
    return Box(*numbers, (width, height) if has_size else None)


def _by_id(rows: Any, key: str, path: Path, expected: str) -> dict:
    """Return {row[key]: row}. Raises ValueError unless `rows` is a list of mappings with IDs, without contradictions."""
    if not isinstance(rows, list):
        raise ValueError(f"{path}: found {type(rows).__name__}; expected {expected}")
    by_id = {}
    for number, row in enumerate(rows):
        row_id = row.get(key) if isinstance(row, dict) else None
        if not isinstance(row_id, (int, str)):
            raise ValueError(f"{path}: record {number} is {row!r:.60}; expected {expected}")
        if row_id in by_id and by_id[row_id] != row:
            raise ValueError(
                f"{path}: '{key}' {row_id} is there twice, with different content; keep one of them"
            )
        by_id[row_id] = row
    return by_id


class _PlainUnpickler(pickle.Unpickler):
    """Loads only lists, mappings, texts and numbers: a pickle that refers to a class or function could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(
            f"names {module}.{name}, which could run code; expected plain lists and mappings"
        )


def _unpickled(path: Path) -> Any:
    with open(path, "rb") as file:
        try:
            return _PlainUnpickler(file, encoding="utf-8").load()
        except (
            pickle.UnpicklingError,
            EOFError,
            ValueError,
            LookupError,
            AttributeError,
            ImportError,
        ) as error:
            raise ValueError(
                f"{path}: not a pickle of REFER ({error or type(error).__name__})"
            ) from error
