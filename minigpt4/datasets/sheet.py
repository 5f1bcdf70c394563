"""The contact sheet: cards of an image and of its text, token by token. Layout first, as data; then it is painted."""

import unicodedata
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

# kind of token -> (two shades that alternate, ink, what the legend says)
STYLES = {
    "begin": (("#fde68a", "#fde68a"), "#78350f", "start token"),
    "prompt": (("#dbeafe", "#bfdbfe"), "#1e3a8a", "prompt: read"),
    "picture": (("#7c3aed", "#7c3aed"), "#ffffff", "the image"),
    "target": (("#bbf7d0", "#86efac"), "#14532d", "target: learnt"),
    "given": (("#e5e7eb", "#d1d5db"), "#374151", "read, not learnt"),
    "cut": (("#fecaca", "#fca5a5"), "#b91c1c", "cut off: neither"),
}
CARD, GAP, PICTURE, SIZE, LINE = 620, 14, 224, 15, 23  # pixels
TEXT = CARD - PICTURE - 3 * GAP  # width of a card's text
NEW_LINE = "↵"
SHOWN_AS = {"\t": "⇥", "\r": "␍"}


class Card(NamedTuple):
    """One sample; `tokens` have text, kind (a key of STYLES), size (positions) and is_special."""

    sample_id: str
    picture: Image.Image
    tokens: list


class Box(NamedTuple):
    """A token, or a part of one that goes on in the next line, at its place in pixels."""

    x: float
    y: float
    width: float
    text: str
    token: int  # its number


def draw(title, notes, groups):
    """Return the sheet as a PIL image: title, legend, and for each (heading, cards) a grid of cards."""
    num_cards = sum(len(cards) for _, cards in groups)
    columns = 1 if num_cards == 1 else 2 if num_cards <= 8 else 3
    width = max(2, columns) * (CARD + GAP) + GAP
    head = GAP + 32 + LINE * len(notes) + LINE + GAP
    boxes = [[lay_out(card.tokens) for card in cards] for _, cards in groups]
    rows = [  # heights of the rows of cards of each group
        [max(map(card_height, laid[at : at + columns])) for at in range(0, len(laid), columns)] for laid in boxes
    ]
    height = head + sum(36 + sum(heights) + GAP * len(heights) for heights in rows)
    image = Image.new("RGB", (width, height), "#f8fafc")
    paint = ImageDraw.Draw(image)
    _head(paint, title, notes, width)
    y = head
    for (heading, cards), laid, heights in zip(groups, boxes, rows, strict=True):
        write(paint, (GAP, y + 4), visible(heading), "#0f172a", 18)
        y += 36
        for number, (card, of_card) in enumerate(zip(cards, laid, strict=True)):
            row, column = divmod(number, columns)
            top = y + sum(heights[:row]) + GAP * row
            _card(image, card, of_card, GAP + column * (CARD + GAP), top, heights[row])
        y += sum(heights) + GAP * len(heights)
    return image


def lay_out(tokens, width=TEXT):
    """Return the Boxes of tokens in lines of `width` pixels; words stay whole where a line can hold them."""
    boxes, x, y = [], 0.0, 0
    for word in _words(tokens):
        length = sum(measure(text) for text, _ in word)
        if x and x + length > width:
            x, y = (-measure(" ") if word[0][0].startswith(" ") else 0.0), y + LINE  # the space hangs over
        for text, number in word:
            for part in _parts(text, width):
                if x and x + measure(part) > width:
                    x, y = 0.0, y + LINE
                boxes.append(Box(x, y, measure(part), part, number))
                x += boxes[-1].width
            if text.endswith(NEW_LINE):
                x, y = 0.0, y + LINE
    return boxes


def _words(tokens):
    """Yield lists of (text as it is shown, number of its token): up to the next space, line or kind of token."""
    word, kind = [], None
    for number, token in enumerate(tokens):
        lines = visible(token.text).split("\n")
        pieces = [line + NEW_LINE for line in lines[:-1]] + ([lines[-1]] if lines[-1] or len(lines) == 1 else [])
        for piece in pieces:
            is_new = piece[:1].isspace() or (token.kind, token.is_special) != kind
            if word and (is_new or word[-1][0].endswith(NEW_LINE)):
                yield word
                word = []
            word, kind = [*word, (piece, number)], (token.kind, token.is_special)
    yield word


def _parts(text, width):
    """Yield a text in parts that fit into `width` pixels."""
    while measure(text) > width:
        fits = next(end for end in range(len(text) - 1, 0, -1) if end == 1 or measure(text[:end]) <= width)
        yield text[:fits]
        text = text[fits:]
    yield text


def summary(tokens):
    """Return (what is read and learnt, what is cut or '') of a card, in numbers."""
    sizes = {kind: sum(token.size for token in tokens if token.kind == kind) for kind in STYLES}
    cut = f"{sizes['cut']} token{'s' if sizes['cut'] > 1 else ''} cut off" if sizes["cut"] else ""
    return f"{sum(sizes.values()) - sizes['cut']} tokens read, {sizes['target']} of them learnt", cut


def card_height(boxes):
    """Return the height in pixels of a card whose text has these Boxes."""
    return max(PICTURE, boxes[-1].y + LINE) + 2 * GAP + 2 * LINE


# painting


def _head(paint, title, notes, width):
    write(paint, (GAP, GAP), visible(title), "#0f172a", 22)
    for number, note in enumerate(notes):
        write(paint, (GAP, GAP + 32 + LINE * number), shorten(visible(note), width - 2 * GAP), "#475569")
    x, y = GAP, GAP + 32 + LINE * len(notes)
    for shades, ink, label in STYLES.values():
        x += _token(paint, x, y, label, shades[0], ink) + 10
    x += _token(paint, x, y, "framed: a special token", "#ffffff", "#0f172a", is_special=True) + 10
    write(paint, (x, y), "shades alternate from token to token", "#475569")


def _card(image, card, boxes, x, y, height):
    paint = ImageDraw.Draw(image)
    read, cut = summary(card.tokens)
    edge = ("#ef4444", 2) if cut else ("#cbd5e1", 1)
    paint.rounded_rectangle((x, y, x + CARD - 1, y + height - 1), 8, "#ffffff", *edge)
    image.paste(_fit(card.picture), (x + GAP, y + GAP + LINE))
    write(paint, (x + GAP, y + 8), shorten(visible(card.sample_id), CARD - 2 * GAP), "#475569", 13)
    left, top = x + PICTURE + 2 * GAP, y + GAP + LINE
    for box in boxes:
        token = card.tokens[box.token]
        shades, ink, _ = STYLES[token.kind]
        place = (left + box.x, top + box.y, box.text, shades[box.token % 2], ink)
        _token(paint, *place, is_special=token.is_special, is_struck=token.kind == "cut")
    bottom = y + height - LINE - 4
    write(paint, (x + GAP, bottom), read, "#475569", 13)
    write(paint, (x + GAP * 2 + measure(read, 13), bottom), cut, "#b91c1c", 13)


def _token(paint, x, y, text, fill, ink, is_special=False, is_struck=False):
    """Paint one box and return its width."""
    width = measure(text)
    paint.rectangle((x, y, x + width - 1, y + LINE - 4), fill, ink if is_special else None)
    write(paint, (x, y), text, ink)
    if is_struck:
        paint.line((x, y + LINE // 2 - 1, x + width - 1, y + LINE // 2 - 1), ink)
    return width


def _fit(picture):
    """Return an image in the size of the cards; pixels of small ones stay visible."""
    small = PICTURE % picture.width == 0 and PICTURE % picture.height == 0
    return picture.resize((PICTURE, PICTURE), Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC)


# text in whatever script


def visible(text):
    """Return a text with everything but line breaks as something that can be seen; what no font has as [U+..]."""
    return "".join(
        char if char == "\n" else SHOWN_AS.get(char, char if _can_be_seen(char) else f"[U+{ord(char):04X}]")
        for char in text
    )


def _can_be_seen(char):
    return char == " " or (
        unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and _font_with(char)
    )


def shorten(text, width):
    """Return the end of a text that fits into `width` pixels."""
    if measure(text) <= width:
        return text
    return "…" + next(text[start:] for start in range(len(text)) if measure("…" + text[start:]) <= width)


@cache
def measure(text, size=SIZE):
    """Return the width of a text in pixels; an empty one still is a place."""
    return sum(font.getlength(part) for part, font in _runs(text, size)) if text else 4


def write(paint, place, text, ink, size=SIZE):
    x, y = place
    for part, font in _runs(text, size):
        paint.text((x, y + size), part, ink, font, anchor="ls")
        x += font.getlength(part)


def _runs(text, size):
    """Return [(part of a text, the font that has its characters)]."""
    by_font = groupby(text, lambda char: _font_with(char) or _sans())
    return [("".join(part), _font(path, size)) for path, part in by_font]


@cache
def _font(path, size):
    return ImageFont.truetype(path, size)


@cache
def _sans():
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")


@cache
def _characters(path):
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(path).get_charmap())


@cache
def _system_fonts():
    from matplotlib.font_manager import findSystemFonts

    return sorted(findSystemFonts())


@cache
def _font_with(char):
    """Return the path of a font that has a character: DejaVu Sans, else any of the system's; None if there is none."""
    if ord(char) in _characters(_sans()):
        return _sans()
    for path in _system_fonts():
        try:
            if ord(char) in _characters(path) and _font(path, SIZE).getlength(char):
                return path
        except (OSError, RuntimeError):  # bitmap fonts have no size 15
            continue
    return None
