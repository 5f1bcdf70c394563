"""Boxes: intersection over union, and accuracy on RefCOCO by MiniGPT-v2's rule."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from minigpt4.evaluation.metrics.matching import aligned, matched

Box = Sequence[float]
_BOX = re.compile(r"\{(?:<\d{1,3}>){4}\}")


def box_iou(a: Box, b: Box, plus_one: bool = False) -> float:
    """Return the intersection over union, 0 to 1, of two boxes (left, top, right, bottom).

    With `plus_one` the right and bottom edges are inclusive pixels, so a box is one wider and higher: MiniGPT-v2's rule.
    A box whose right edge is left of its left edge is empty. Raises ValueError unless a box is four finite numbers.
    """
    a, b = _numbers(a, 4, "box"), _numbers(b, 4, "box")
    extra = 1.0 if plus_one else 0.0
    shared = _area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]), extra)
    union = _area(*a, extra) + _area(*b, extra) - shared
    return shared / union if union else 0.0


def box_accuracy(
    answers: Mapping[Hashable, str] | Sequence[str],
    boxes: Mapping[Hashable, Box] | Sequence[Box],
    sizes: Mapping[Hashable, Sequence[float]] | Sequence[Sequence[float]],
    resolution: int = 100,
    is_common: bool = False,
) -> dict:
    """Return the accuracy of predicted boxes, by the rule of MiniGPT-4's `eval_scripts/eval_ref.py`.

    {"accuracy", "unparsable", "count", "iou" and "hits": by id}: an answer is right if the intersection over union with
    inclusive pixels (`plus_one`) is MORE than 0.5; with `is_common`, the rule of most others (lmms-eval), if it is at
    least 0.5 without the added pixels. `boxes` are (x, y, width, height) in pixels as in COCO's files, `sizes` are
    (width, height) of the images. An unparsable answer (`parse_box`) is wrong. Raises ValueError for ids that do not
    match and for invalid boxes or sizes.
    """
    texts, boxes = matched(answers, boxes, "boxes")
    sizes = aligned(sizes, boxes, "sizes")
    iou, unparsable = {}, 0
    for item, text in texts.items():
        truth = _corners(_numbers(boxes[item], 4, f"box of {item!r}"))
        size = _numbers(sizes[item], 2, f"size of {item!r}")
        relative = parse_box(text, resolution)
        if relative is None:
            unparsable += 1
            iou[item] = 0.0
        else:
            predicted = np.multiply(relative, size * 2)  # in pixels: (width, height) twice
            iou[item] = box_iou(predicted, truth, plus_one=not is_common)
    hits = {item: float(value > 0.5 or (is_common and value == 0.5)) for item, value in iou.items()}
    accuracy = sum(hits.values()) / len(hits)
    return {
        "accuracy": accuracy,
        "unparsable": unparsable,
        "count": len(iou),
        "iou": iou,
        "hits": hits,
    }


def parse_box(text: str, resolution: int = 100) -> tuple[float, float, float, float] | None:
    """Return (left, top, right, bottom), each divided by `resolution`, of a text {<x1><y1><x2><y2>}; else None.

    As MiniGPT-v2 writes it: spaces and <unk> aside, the text starts with the box and has no fifth number; a second box
    makes it unparsable.
    """
    text = _cleaned(text)
    numbers = [int(digits) / resolution for digits in re.findall(r"\d+", text)]
    return tuple(numbers) if _BOX.match(text) and len(numbers) == 4 else None


def starts_with_box(text: str) -> bool:
    """Return whether a text starts with {<x1><y1><x2><y2>}, spaces and <unk> aside; MiniGPT-v2 asks again if not."""
    return bool(_BOX.match(_cleaned(text)))


def _cleaned(text: str) -> str:
    return text.replace("<unk>", "").replace(" ", "").strip()


def _area(left: float, top: float, right: float, bottom: float, extra: float) -> float:
    return max(0.0, right - left + extra) * max(0.0, bottom - top + extra)


def _corners(box: Box) -> Box:
    """Convert (x, y, width, height) to (left, top, right, bottom)."""
    return (box[0], box[1], box[0] + box[2], box[1] + box[3])


def _numbers(values: Sequence[float], count: int, name: str) -> tuple[float, ...]:
    """Return the values as floats. Raises ValueError unless they are `count` finite numbers."""
    try:
        numbers = tuple(float(value) for value in values) if not isinstance(values, str) else ()
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name}: found {values!r}; expected {count} numbers")
    return numbers
