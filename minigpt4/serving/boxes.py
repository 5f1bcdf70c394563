"""Boxes in the words of MiniGPT-v2: found in a text, given colours, drawn on the image.

A box is {<x0><y0><x1><y1>} in hundredths of width and height; `<p>words</p>` before one or several, joined by
`<delim>`, says what is there.
"""

import base64
import io
import re
from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageOps

from minigpt4.conversation.images import open_image
from minigpt4.serving.session import MAX_PIXELS

Box = tuple[int, ...]  # x0, y0, x1, y1

_BOX = r"\{(?:\s*<-?[0-9]{1,9}>){4}\s*\}"
_BOXES = rf"{_BOX}(?:\s*(?:<delim>\s*)?{_BOX})*"
# words with boxes, words alone, or boxes alone
PHRASE = re.compile(
    rf"<p>(?P<words>(?:(?!</?p>).)*)</p>(?:\s*(?P<boxes>{_BOXES}))?|(?P<bare>{_BOXES})"
)
# white letters are legible on each, and each shows on a light and on a dark page
COLOURS = ("#c62828", "#1565c0", "#2e7d32", "#7b1fa2", "#b34700", "#00747a", "#c2185b", "#6d4c41")
PICTURE_SIDE = (
    640  # pixels of the longer side, drawn twice as large as it is shown: for fine screens
)


class Phrase(NamedTuple):
    """Something that a text gives boxes; without words its name is the boxes' own text."""

    name: str
    boxes: tuple[Box, ...]


def name_group(match: re.Match) -> str:
    """Return which group of PHRASE names what a match found: its words, or its boxes where there are none."""
    if match["words"] is None:
        return "bare"
    return "boxes" if match["boxes"] and not match["words"].strip() else "words"


def phrase_of(match: re.Match) -> Phrase:
    """Return what a match of PHRASE found; words alone have no boxes."""
    numbers = [
        int(digits) for digits in re.findall(r"-?[0-9]+", match["boxes"] or match["bare"] or "")
    ]
    boxes = tuple(tuple(numbers[start : start + 4]) for start in range(0, len(numbers), 4))
    return Phrase(match[name_group(match)].strip(), boxes)


def phrases_in(text: str) -> list[Phrase]:
    """Return the phrases of a text that have boxes, in order."""
    return [phrase for phrase in map(phrase_of, PHRASE.finditer(text)) if phrase.boxes]


def colours_of(phrases: list[Phrase]) -> dict[str, str]:
    """Return a colour for each name; the same words have the same one."""
    names = dict.fromkeys(phrase.name for phrase in phrases)
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}


def fitted(box: Box) -> tuple[Box | None, str]:
    """Return (what of a box is in the image, what is odd about it); None where it has no place there."""
    (left, right), (top, bottom) = sorted(box[::2]), sorted(box[1::2])
    upright = (left, top, right, bottom)
    if right < 0 or bottom < 0 or left > 100 or top > 100:
        return None, "outside of the image"
    inside = tuple(min(max(number, 0), 100) for number in upright)
    if inside != upright:
        return inside, "reaches beyond the image"
    return inside, "" if upright == tuple(box) else "corners in the wrong order"


def remarks(phrases: list[Phrase]) -> list[str]:
    """Return a line on each kind of odd box: what it is, and which boxes are it."""
    found = {}
    for phrase in phrases:
        for box in phrase.boxes:
            found.setdefault(fitted(box)[1], {})[
                "{" + "".join(f"<{number}>" for number in box) + "}"
            ] = None
    return [f"{kind}: {', '.join(boxes)}" for kind, boxes in found.items() if kind]


def draw(image: Image.Image, phrases: list[Phrase]) -> Image.Image:
    """Return an RGB image with the boxes of `phrases` in their colours, each between lines of white."""
    image, colours = image.copy(), colours_of(phrases)
    pencil, line = ImageDraw.Draw(image), max(2, round(max(image.size) / 160))
    sides = image.size * 2
    for phrase in phrases:
        for box in filter(None, (fitted(box)[0] for box in phrase.boxes)):
            corners = [
                min(int(number / 100 * side), side - 1)
                for number, side in zip(box, sides, strict=True)
            ]
            wide = [corner + (1 if at > 1 else -1) for at, corner in enumerate(corners)]
            pencil.rectangle(wide, outline="white", width=line + 2)
            pencil.rectangle(corners, outline=colours[phrase.name], width=line)
    return image


def picture(path: str, text: str) -> str:
    """Return HTML of the image at `path` with the boxes of `text` drawn on it; "" where there are none.

    Raises OSError and ValueError for what is no image.
    """
    phrases = phrases_in(text)
    return _picture(path, tuple(phrases)) if phrases else ""


@lru_cache(64)
def _picture(path: str, phrases: tuple[Phrase, ...]) -> str:
    image, file = draw(_resized(path), list(phrases)), io.BytesIO()
    image.save(file, "JPEG", quality=88)
    alt = f"the image with {sum(len(phrase.boxes) for phrase in phrases)} box(es)"
    source = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    return (
        f'<img alt="{alt}" width="{image.width // 2}" height="{image.height // 2}" src="{source}">'
    )


@lru_cache(16)
def _resized(path: str) -> Image.Image:
    return ImageOps.contain(open_image(path, MAX_PIXELS), (PICTURE_SIDE, PICTURE_SIDE))
