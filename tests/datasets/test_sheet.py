"""The contact sheet: where every token lies, then that the image shows it."""

from itertools import pairwise
from typing import NamedTuple

import pytest
from PIL import Image, ImageChops

from minigpt4.datasets.sheet import (
    CARD,
    GAP,
    LINE,
    PICTURE,
    STYLES,
    TEXT,
    Card,
    card_height,
    draw,
    lay_out,
    measure,
    shorten,
    summary,
    visible,
)


class Token(NamedTuple):
    text: str
    kind: str = "target"
    size: int = 1
    is_special: bool = False


WORDS = [Token(word) for word in ["A", " bus", " and", " a", " d", "og", " in", " the", " str", "eet", "."] * 6]
BEGIN = [Token("<s>", "begin", 1, True), Token("<Img>", "prompt"), Token("image: 32 tokens", "picture", 32)]


def card(tokens, colour="red"):
    return Card("laion/00000.tar/000000001", Image.new("RGB", (56, 56), colour), tokens)


def sheet(*cards):
    return draw("title", ["note"], [("laion: 2 samples", list(cards))])


# layout


def test_every_token_is_there_in_order_and_within_the_card():
    boxes = lay_out(BEGIN + WORDS)
    assert [box.token for box in boxes] == list(range(len(BEGIN + WORDS)))
    assert [box.text for box in boxes] == [token.text for token in BEGIN + WORDS]
    assert all(-measure(" ") <= box.x and box.x + box.width <= TEXT for box in boxes)
    lines = sorted({box.y for box in boxes})
    assert lines == [LINE * number for number in range(len(lines))] and len(lines) > 3
    for y in lines:
        row = [box for box in boxes if box.y == y]
        assert all(left.x + left.width == pytest.approx(right.x) for left, right in pairwise(row))


def test_words_are_not_broken_but_between_lines_of_their_own():
    boxes = lay_out(WORDS)
    for left, right in pairwise(boxes):
        assert left.y == right.y or right.text.startswith(" ")


def test_what_no_line_can_hold_goes_on_in_the_next():
    boxes = lay_out([Token("a" * 200)])
    assert "".join(box.text for box in boxes) == "a" * 200 and len(boxes) > 2
    assert all(box.x + box.width <= TEXT for box in boxes) and {box.token for box in boxes} == {0}


def test_line_breaks_are_seen_and_break_the_line():
    boxes = lay_out([Token("one\n"), Token("two"), Token("\n\n"), Token("three")])
    assert [(box.text, box.y // LINE, box.token) for box in boxes] == [
        ("one↵", 0, 0),
        ("two", 1, 1),
        ("↵", 1, 2),
        ("↵", 2, 2),
        ("three", 3, 3),
    ]


def test_a_token_without_text_has_a_place():
    assert [box.width > 0 for box in lay_out([Token(""), Token("a")])] == [True, True]


def test_the_summary_counts_positions():
    tokens = [*BEGIN, Token("a"), Token("b", "given", 2), Token("c", "cut", 3)]
    assert summary(tokens) == ("37 tokens read, 1 of them learnt", "3 tokens cut off")
    assert summary(tokens[:-1]) == ("37 tokens read, 1 of them learnt", "")


# text in whatever script


def test_nothing_is_invisible_or_an_empty_box():
    assert visible("Grüße, мир ❤") == "Grüße, мир ❤"
    assert visible("a\tb\u200dc\x00") == "a⇥b[U+200D]c[U+0000]"
    assert visible("two\nlines") == "two\nlines"
    assert visible("\U000e0041\u0378") == "[U+E0041][U+0378]"  # a tag, and a code point that is no character
    assert visible("漢") in ("漢", "[U+6F22]")  # as the fonts of the machine are


def test_long_names_keep_their_end():
    short = shorten("a/very/long/folder" * 9 + "/00003.tar/000030050", 300)
    assert short.startswith("…") and short.endswith("00003.tar/000030050") and measure(short) <= 300
    assert shorten("short", 300) == "short"


# the image


def test_size_follows_from_the_cards():
    small, large = card(BEGIN + WORDS[:4]), card(BEGIN + WORDS * 4)
    assert card_height(lay_out(small.tokens)) == PICTURE + 2 * GAP + 2 * LINE
    tall = card_height(lay_out(large.tokens))
    assert tall > 400
    one, two, three, nine = (sheet(*cards) for cards in ([small], [small, large], [small, large, small], [small] * 9))
    assert one.width == two.width == three.width == 2 * (CARD + GAP) + GAP
    assert nine.width == 3 * (CARD + GAP) + GAP
    assert two.height - one.height == tall - card_height(lay_out(small.tokens))
    assert three.height - two.height == card_height(lay_out(small.tokens)) + GAP


def text_of(image, tokens):
    """Return the part of a sheet that has the text of its first card, whose tokens these are."""
    left, top = GAP + PICTURE + 2 * GAP, image.height - GAP - card_height(lay_out(tokens)) + GAP + LINE
    return image.crop((left, top, left + TEXT, image.height - 2 * GAP - 2 * LINE))


@pytest.mark.parametrize("change", [{"kind": "given"}, {"kind": "prompt"}, {"is_special": True}])
def test_a_token_that_is_another_is_seen_at_its_place(change):
    tokens, number = BEGIN + WORDS, len(BEGIN) + 20
    other = [*tokens[:number], tokens[number]._replace(**change), *tokens[number + 1 :]]
    before, after = (text_of(sheet(card(of_card)), tokens) for of_card in (tokens, other))
    left, top, right, bottom = ImageChops.difference(before, after).getbbox()
    box = lay_out(tokens)[number]
    # letters and boxes begin at whole pixels
    assert box.x - 1 <= left < right <= box.x + box.width + 1 and box.y <= top < bottom <= box.y + LINE


def test_what_is_cut_is_red_and_so_is_the_edge_of_its_card():
    red = [tuple(bytes.fromhex(shade[1:])) for shade in STYLES["cut"][0]]
    cut = [token._replace(kind="cut") if number > 50 else token for number, token in enumerate(BEGIN + WORDS)]
    for tokens, is_cut in ((BEGIN + WORDS, False), (cut, True)):
        image = sheet(card(tokens), card(WORDS))
        colours = {colour for _, colour in text_of(image, tokens).getcolors(1 << 24)}
        assert (red[0] in colours, red[1] in colours) == (is_cut, is_cut)
        edge = image.getpixel((GAP, image.height - GAP - 100))
        assert (edge == (0xEF, 0x44, 0x44)) == is_cut


def test_small_pictures_keep_their_pixels():
    picture = Image.new("RGB", (2, 2), "blue")
    picture.putpixel((0, 0), (255, 255, 0))
    image = sheet(Card("a", picture, BEGIN))
    x, y = GAP + GAP, image.height - GAP - card_height(lay_out(BEGIN)) + GAP + LINE
    shown = image.crop((x, y, x + PICTURE, y + PICTURE))
    half = PICTURE // 2
    assert [shown.getpixel(at) for at in ((half - 1, half - 1), (half, half - 1), (half - 1, half))] == [
        (255, 255, 0),
        (0, 0, 255),
        (0, 0, 255),
    ]
