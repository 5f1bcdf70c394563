"""Boxes in questions and answers: finding, colouring and drawing them, whatever the text."""

import base64
import io
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minigpt4.serving.boxes import COLOURS, Phrase, colours_of, draw, fitted, phrases_in, remarks
from minigpt4.serving.session import Turn
from minigpt4.serving.shown import as_markdown, messages
from tests.golden_v2 import GOLDEN
from tests.serving.test_shown import HARMLESS, PIECES, tags_of

GROUNDED = "<p>a man</p> {<1><2><30><40>} and <p>two dogs</p> {<5><5><9><9>}<delim>{<50><5><90><9>}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (GROUNDED, [("a man", [(1, 2, 30, 40)]), ("two dogs", [(5, 5, 9, 9), (50, 5, 90, 9)])]),
        ("{<10><20><30><40>}", [("{<10><20><30><40>}", [(10, 20, 30, 40)])]),
        ("<p>a</p> <p>b</p> {<1><2><3><4>}", [("b", [(1, 2, 3, 4)])]),
        ("<p></p> { <1> <2> <3> <4> }", [("{ <1> <2> <3> <4> }", [(1, 2, 3, 4)])]),
        ("<p>x</p>{<-5><0><120><300>} {<1><2><3><4>}", [("x", [(-5, 0, 120, 300), (1, 2, 3, 4)])]),
        ("<p>cut</p> {<1><2><3", []),
        (
            "{<1><2><3>} {<1><2><3><4><5>} {<a><b><c><d>} {<1><2><3><99999999999>} {<١><٢><٣><٤>}",
            [],
        ),
        ("no box", []),
    ],
)
def test_what_is_found(text, found):
    assert phrases_in(text) == [Phrase(name, tuple(boxes)) for name, boxes in found]


def test_boxes_are_drawn_where_the_release_draws_them():
    """Of its cases those that are not among its mistakes; a box that is drawn begins and ends at its pixels."""
    cases = json.loads((GOLDEN / "h_evaluation/demo_v2_helpers.json").read_text())["visualise"]
    compared = 0
    for case in cases:
        phrases = phrases_in(case["text"])
        if not case["image_size"] or "-5" in case["text"] or "&lt;" in case["text"]:
            continue
        drawn = np.asarray(draw(Image.new("RGB", case["image_size"]), phrases))
        boxes = [(phrase.name, box) for phrase in phrases for box in phrase.boxes]
        for ((left, top), (right, bottom), _), (name, _) in zip(
            case["rectangles"], boxes, strict=True
        ):
            colour = [int(colours_of(phrases)[name][at : at + 2], 16) for at in (1, 3, 5)]
            for y, x in (
                (top, left),
                (bottom, right),
                ((top + bottom) // 2, left),
                (top, (left + right) // 2),
            ):
                assert drawn[y, x].tolist() == colour, case["text"]
            compared += 1
    assert compared >= 8


@pytest.mark.parametrize(
    ("box", "inside", "remark"),
    [
        ((8, 10, 38, 40), (8, 10, 38, 40), ""),
        ((0, 0, 100, 100), (0, 0, 100, 100), ""),
        ((50, 50, 50, 60), (50, 50, 50, 60), ""),  # thin things have one number for both sides
        ((70, 60, 104, 90), (70, 60, 100, 90), "reaches beyond the image"),
        ((-2, 97, 44, 105), (0, 97, 44, 100), "reaches beyond the image"),
        ((60, 20, 30, 40), (30, 20, 60, 40), "corners in the wrong order"),
        ((101, 0, 400, 20), None, "outside of the image"),
    ],
)
def test_odd_boxes_are_cut_turned_or_left_out_and_named(box, inside, remark):
    assert fitted(box) == (inside, remark)
    image, phrases = Image.new("RGB", (40, 30), "gray"), [Phrase("x", (box,))]
    assert (draw(image, phrases).tobytes() == image.tobytes()) == (inside is None)
    said = as_markdown("{" + "".join(f"<{number}>" for number in box) + "}", True)
    assert ('class="note"' in said) == bool(remark) and remark in said


def test_remarks_name_each_box_once():
    text = "{<1><2><300><4>} {<1><2><300><4>} {<9><2><3><4>} {<1><2><3><4>}"
    assert remarks(phrases_in(text)) == [
        "reaches beyond the image: {<1><2><300><4>}",
        "corners in the wrong order: {<9><2><3><4>}",
    ]


def test_the_same_words_have_the_same_colour_and_white_letters_are_legible_on_each():
    names = [str(number) for number in range(12)]
    colours = colours_of([Phrase(name, ()) for name in [*names, "0"]])
    assert (
        list(colours) == names
        and len({*colours.values()}) == len(COLOURS)
        and colours["8"] == colours["0"]
    )
    for colour in COLOURS:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        contrast = 1.05 / (np.dot([0.2126, 0.7152, 0.0722], linear) + 0.05)
        assert contrast >= 4.5, colour  # WCAG 2.1, level AA


def test_words_are_coloured_and_the_whole_answer_can_be_copied():
    html = as_markdown(f"**Look**: {GROUNDED}, <p>no box</p>, `<p>code</p> {{<1><2><3><4>}}`", True)
    coloured = re.findall(r'<span class="phrase" style="background: (#\w+)">([^<]*)</span>', html)
    assert coloured == [(COLOURS[0], "a man"), (COLOURS[1], "two dogs")]
    shown = re.sub(r"<[^>]*>", "", re.sub(r'<span class="raw">[^<]*</span>', "", html))
    assert (
        shown.strip()
        == "Look: a man and two dogs, no box, &lt;p&gt;code&lt;/p&gt; {&lt;1&gt;&lt;2&gt;&lt;3&gt;&lt;4&gt;}"
    )
    copied = re.sub(r"<[^>]*>", "", html).replace("&lt;", "<").replace("&gt;", ">").strip()
    assert copied == f"Look: {GROUNDED}, <p>no box</p>, <p>code</p> {{<1><2><3><4>}}"


def test_words_that_markdown_changes_are_words():
    text = "|a|b|\n|-|-|\n|<p>x\\|y</p> {<1><2><3><4>}|z|"
    assert "<span>x|y</span>" in as_markdown(text, True)
    assert "<span>\ufffd</span>" in as_markdown("<p>\0</p> {<1><2><3><4>}", True)


BOX_PIECES = [
    *PIECES,
    "<p>",
    "</p>",
    " {<1><2><3><4>}",
    "<delim>",
    "{<9>",
    "<-7>",
    "{<200><0><-3><5>}",
]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(BOX_PIECES) | st.text(max_size=5), max_size=12).map("".join))
def test_no_text_with_boxes_makes_a_tag_that_loads_or_runs(text):
    for tag, attributes in tags_of(as_markdown(text, True)):
        assert tag in HARMLESS | {"span"}, text
        assert set(attributes) <= {"class", "start", "style"}, text
        assert re.fullmatch(
            r"(text-align:(left|right|center)|background: #\w{6})?", attributes.get("style", "")
        ), text
    draw(Image.new("RGB", (7, 5)), phrases_in(text))


@pytest.fixture
def dialogue(tmp_path):
    """A first image with its question, a second one, and a question about that."""
    for number, colour in enumerate(["white", "yellow"]):
        Image.new("RGB", (60 - 20 * number, 40), colour).save(tmp_path / f"{number}.png")
    return [
        Turn("[grounding] describe", (str(tmp_path / "0.png"),), answer=GROUNDED),
        Turn(
            "[identify] what is this {<10><20><50><60>}",
            (str(tmp_path / "1.png"),),
            answer="a <b>dog</b>",
        ),
        Turn("[refer] dog", answer="{<10><20><50><60>}"),
    ]


def pictures(content):
    """Return the sizes of the pictures with boxes in a message."""
    htmls = [
        part["value"]
        for part in content
        if isinstance(part, dict) and part.get("component") == "html"
    ]
    sources = [re.search(r'src="data:image/jpeg;base64,([^"]+)"', html)[1] for html in htmls]
    return [Image.open(io.BytesIO(base64.b64decode(source))).size for source in sources]


def test_boxes_are_drawn_on_the_latest_image_before_them(dialogue):
    shown = [message["content"] for message in messages(dialogue, with_boxes=True)]
    wide, square = (640, 427), (640, 640)
    assert [pictures(content) for content in shown] == [[], [wide], [square], [], [], [square]]
    assert (
        shown[3] == as_markdown("a <b>dog</b>")
        and shown[2][-1] == "[identify] what is this {&lt;10>&lt;20>&lt;50>&lt;60>}"
    )


def test_without_boxes_or_without_the_image_the_text_stands_as_it_is(dialogue, tmp_path):
    assert [pictures(message["content"]) for message in messages(dialogue)] == [[]] * 6
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_text("no image")
    for message, turn in zip(messages(dialogue, with_boxes=True)[1::2], dialogue, strict=True):
        assert message["content"] == as_markdown(turn.answer)
    assert [
        pictures(message["content"])
        for message in messages([Turn("{<1><2><3><4>}")], with_boxes=True)
    ] == [[]]


@pytest.mark.parametrize("size", [(10_000, 1), (4000, 3), (3, 4000), (1, 1)])
def test_boxes_of_a_thin_image_are_coloured_too(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "thin.png")
    turn = Turn("where?", (str(tmp_path / "thin.png"),), answer=GROUNDED)
    (answer,) = [message["content"] for message in messages([turn], with_boxes=True)][1:]
    ((width, height),) = pictures(answer)
    assert max(width, height) == 640 and min(width, height) > 0
    assert f"background: {COLOURS[0]}" in answer[0] and 'height="0"' not in str(answer)
