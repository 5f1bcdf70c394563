"""The contact sheet: a page with one span per token, in order, with its kind as class."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from minigpt4.datasets.sheet import Card, page, summary, visible
from minigpt4.text.preview import BEGIN, CUT, GIVEN, IMAGE, KINDS, PROMPT, TARGET, Token

WORDS = [
    Token(word, "target", 1)
    for word in ["A", " bus", " and", " a", " d", "og", " in", " the", " str", "eet"] * 6
]
HEAD = [
    Token("<s>", BEGIN, 1, True),
    Token("<Img>", PROMPT, 1),
    Token("image: 32 tokens", IMAGE, 32),
]


def card(tokens, colour="red", size=(56, 56)):
    return Card("laion/00000.tar/000000001", [Image.new("RGB", size, colour)], tokens)


def sheet(*cards):
    return page("title", ["note"], [("laion: 2 samples", list(cards))])


class Reader(HTMLParser):
    """Parses a page: `spans` (text, classes) of each card, `images`, and in `open` elements that are not closed."""

    def __init__(self, html):
        super().__init__()
        self.open, self.spans = [], []
        self.images, self.edges = [], []
        self.all_text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "figure":
            self.spans.append([])
            self.edges.append(attrs.get("class"))
        elif tag == "img":
            self.images.append(attrs)
        elif tag == "span" and self.spans:
            self.spans[-1].append(["", set(attrs["class"].split())])
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.all_text += data
        if "span" in self.open and self.spans:
            self.spans[-1][-1][0] += data


def image_of(attrs):
    assert attrs["src"].startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(attrs["src"].partition(",")[2])))


def test_every_token_is_in_its_card_in_order():
    found = Reader(sheet(card(HEAD + WORDS), card(WORDS)))
    assert found.open == [] and len(found.spans) == 2
    assert [text for text, _ in found.spans[0]] == [token.text for token in HEAD + WORDS]
    assert [text for text, _ in found.spans[1]] == [token.text for token in WORDS]
    for (_, classes), token in zip(found.spans[0], HEAD + WORDS, strict=True):
        assert classes == {token.kind} | ({"special"} if token.is_special else set())


@pytest.mark.parametrize("change", [{"kind": GIVEN}, {"kind": PROMPT}, {"is_special": True}])
def test_a_changed_token_changes_the_page_at_its_position(change):
    tokens, number = HEAD + WORDS, len(HEAD) + 20
    other = [*tokens[:number], tokens[number]._replace(**change), *tokens[number + 1 :]]
    before, after = (Reader(sheet(card(of_card))).spans[0] for of_card in (tokens, other))
    assert [place for place, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == [
        number
    ]


def test_kinds_look_different_and_the_legend_names_them():
    html = sheet(card(WORDS))
    colours = [re.findall(rf"\.{kind}{{background:(.*?);color:(.*?)}}", html) for kind in KINDS]
    assert all(len(found) == 1 for found in colours) and len(set(map(tuple, colours))) == len(KINDS)
    legend = [
        "start token",
        "prompt: read",
        "the image",
        "target: learnt",
        "read, not learnt",
        "cut off: neither",
    ]
    for kind, words in zip(KINDS, legend, strict=True):
        assert f'<span class="{kind}">{words}</span>' in html
    assert '<span class="special">framed: a special token</span>' in html
    assert ".special{outline:1px solid}" in html and ".cut{text-decoration:line-through}" in html


def test_text_can_be_copied_unchanged():
    """Line breaks are shown by a sign that is not part of the text."""
    tokens = [
        Token("one\n", TARGET, 1),
        Token("<b>&two", TARGET, 1),
        Token("\n\n", TARGET, 1),
        Token("", TARGET, 1),
    ]
    html = sheet(card(tokens))
    assert [text for text, _ in Reader(html).spans[0]] == ["one\n", "<b>&two", "\n\n", ""]
    assert html.count("<i></i>\n") == 3 and 'i::before{content:"↵"' in html
    assert 'span:empty::before{content:"∅"}' in html  # a token without text is visible
    assert ".text{white-space:pre-wrap}" in html


def test_the_page_needs_nothing_else():
    html = sheet(card(HEAD))
    assert "<script" not in html and not re.search(r"https?:|url\(|@import|<link", html)
    assert "prefers-color-scheme:dark" in html and 'name="viewport"' in html
    assert (
        '<meta charset="utf-8">' in html
        and "<title>title</title>" in html
        and "<p>note</p>" in html
    )


def test_the_summary_counts_positions():
    tokens = [*HEAD, Token("a", TARGET, 1), Token("b", GIVEN, 2), Token("c", CUT, 3)]
    assert summary(tokens) == ("37 tokens read, 1 of them learnt", "3 tokens cut off")
    assert summary(tokens[:-1]) == ("37 tokens read, 1 of them learnt", "")


def test_every_character_is_visible():
    assert visible("Grüße, мир ❤ 漢") == "Grüße, мир ❤ 漢"
    assert visible("a\tb\u200dc\x00\ud800") == "a⇥b[U+200D]c[U+0000][U+D800]"
    assert visible("two\nlines") == "two<i></i>\nlines"
    # a tag character, and a code point that is not a character
    assert visible("\U000e0041\u0378") == "[U+E0041][U+0378]"
    sheet(card([Token("\ud800", TARGET, 1)])).encode()


def test_names_are_complete_and_escaped():
    name = "a/very/long/folder" * 9 + "/<script>.tar/000030050"
    html = page("<t>", ["<n>"], [("<h>", [card(WORDS)._replace(sample_id=name)])])
    assert name in Reader(html).all_text and "<script>" not in html
    assert {"<t>", "<n>", "<h>"} < set(Reader(html).all_text.replace("\n", " ").split())
    assert "overflow-wrap:anywhere" in html


def test_cut_text_is_struck_through_and_its_card_has_a_red_border():
    cut = [
        token._replace(kind=CUT) if number > 50 else token
        for number, token in enumerate(HEAD + WORDS)
    ]
    for tokens, is_cut in ((HEAD + WORDS, False), (cut, True)):
        html = sheet(card(tokens), card(WORDS))
        found = Reader(html)
        assert any(CUT in classes for _, classes in found.spans[0]) == is_cut
        assert found.edges == ["is-cut" if is_cut else None, None]
    assert (
        "figure.is-cut{border:2px solid #ef4444}" in html and "12 tokens cut off" in found.all_text
    )


def test_small_images_keep_their_pixels():
    image = Image.new("RGB", (2, 2), "blue")
    image.putpixel((0, 0), (255, 255, 0))
    html = sheet(Card("a", [image, Image.new("RGB", (224, 224), "red")], HEAD))
    small, large = Reader(html).images
    assert (small.get("class"), large.get("class")) == ("small", None)
    assert "img.small{image-rendering:pixelated}" in html
    assert image_of(small).tobytes() == image.tobytes() and image_of(large).size == (224, 224)
