"""The boxes in texts of MiniGPT-v2: find them, give them colours, draw them on the image.

A box is {<x0><y0><x1><y1>} in hundredths of width and height; `<p>words</p>` before one or several boxes, separated by
`<delim>`, names what is in them.
"""

import base64
import io
import re
from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageDraw

from minigpt4.conversation.images import open_image
from minigpt4.serving.session import MAX_PIXELS

Box = tuple[int, ...]  # x0, y0, x1, y1

_BOX = r"\{(?:\s*<-?[0-9]{1,9}>){4}\s*\}"
_BOXES = rf"{_BOX}(?:\s*(?:<delim>\s*)?{_BOX})*"
# words with boxes, words alone, boxes alone
PHRASE = re.compile(
    rf"<p>(?P<words>(?:(?!</?p>).)*)</p>(?:\s*(?P<boxes>{_BOXES}))?|(?P<bare>{_BOXES})"
)
# white letters are legible on each; each is visible on a light and on a dark page
COLOURS = ("#c62828", "#1565c0", "#2e7d32", "#7b1fa2", "#b34700", "#00747a", "#c2185b", "#6d4c41")
# pixels of the longer side; an image is shown at half this size, for screens of high resolution
PICTURE_SIDE = 640


class Phrase(NamedTuple):
    """Words and their boxes; for boxes without words the name is the text of the boxes."""

    name: str
    boxes: tuple[Box, ...]


def name_group(match: re.Match) -> str:
    """Return which group of PHRASE holds the name of a match: its words, or its boxes if it has no words."""
    if match["words"] is None:
        return "bare"
    return "boxes" if match["boxes"] and not match["words"].strip() else "words"


def phrase_of(match: re.Match) -> Phrase:
    """Return the Phrase of a match of PHRASE; for words alone its boxes are ()."""
    text = match["boxes"] or match["bare"] or ""
    numbers = [int(digits) for digits in re.findall(r"-?[0-9]+", text)]
    boxes = tuple(tuple(numbers[start : start + 4]) for start in range(0, len(numbers), 4))
    return Phrase(match[name_group(match)].strip(), boxes)


def phrases_in(text: str) -> list[Phrase]:
    """Return the phrases in a text that have boxes, in order."""
    return [phrase for phrase in map(phrase_of, PHRASE.finditer(text)) if phrase.boxes]


def colours_of(phrases: list[Phrase]) -> dict[str, str]:
    """Return a colour for each name, so the same one for the same words."""
    names = dict.fromkeys(phrase.name for phrase in phrases)
    return {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}


def fitted(box: Box) -> tuple[Box | None, str]:
    """Return (the part of a box inside the image or None, what is wrong with the box or "")."""
    (left, right), (top, bottom) = sorted(box[::2]), sorted(box[1::2])
    ordered = (left, top, right, bottom)
    if right < 0 or bottom < 0 or left > 100 or top > 100:
        return None, "outside of the image"
    inside = tuple(min(max(number, 0), 100) for number in ordered)
    if inside != ordered:
        return inside, "reaches beyond the image"
    return inside, "" if ordered == tuple(box) else "corners in the wrong order"


def remarks(phrases: list[Phrase]) -> list[str]:
    """Return a line for each kind of invalid box: the kind, and which boxes are of it."""
    texts_of = {}  # kind -> texts of boxes, each once, as the keys of a dict
    for phrase in phrases:
        for box in phrase.boxes:
            text = "{" + "".join(f"<{number}>" for number in box) + "}"
            texts_of.setdefault(fitted(box)[1], {})[text] = None
    return [f"{kind}: {', '.join(texts)}" for kind, texts in texts_of.items() if kind]


def draw(image: Image.Image, phrases: list[Phrase]) -> Image.Image:
    """Return a copy of an RGB image with the boxes of `phrases` in their colours, outlined in white."""
    image, colours = image.copy(), colours_of(phrases)
    pencil, line = ImageDraw.Draw(image), max(2, round(max(image.size) / 160))
    sides = image.size * 2
    for phrase in phrases:
        for box in phrase.boxes:
            inside, _ = fitted(box)
            if inside is None:
                continue
            corners = [
                min(int(number / 100 * side), side - 1)
                for number, side in zip(inside, sides, strict=True)
            ]
            # one pixel larger on each side
            outer = [corner + (1 if at > 1 else -1) for at, corner in enumerate(corners)]
            pencil.rectangle(outer, outline="white", width=line + 2)
            pencil.rectangle(corners, outline=colours[phrase.name], width=line)
    return image


def picture(path: str, text: str) -> str:
    """Return HTML of the image at `path` with the boxes of `text` drawn on it; "" if there are none.

    Raises OSError or ValueError for a file that is no image.
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
    image = open_image(path, MAX_PIXELS)
    scale = PICTURE_SIDE / max(image.size)
    # at least 2: a thin image is shown at half this size, too
    return image.resize([max(2, round(side * scale)) for side in image.size])
