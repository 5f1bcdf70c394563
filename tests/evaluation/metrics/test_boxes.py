"""Intersection over union, and accuracy as MiniGPT-4's eval_ref.py computes it."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4.evaluation.metrics import box_accuracy, box_iou, parse_box


@pytest.mark.parametrize(
    ("a", "b", "plain", "plus_one"),
    [
        ((0, 0, 9, 9), (0, 0, 9, 4), 4 / 9, 0.5),
        ((0, 0, 10, 10), (0, 0, 10, 5), 0.5, 6 / 11),
        ((0, 0, 10, 10), (5, 5, 15, 15), 25 / 175, 0.17475728155339806),
        ((0, 0, 10, 10), (10, 10, 12, 12), 0, 0.007751937984496124),
        ((0, 0, 10, 10), (11, 11, 12, 12), 0, 0),
        ((5, 5, 15, 15), (12.5, 3.25, 40, 31), 25 / (100 + 763.125 - 25), 0.04268884268884269),
        ((0, 0, 0, 0), (0, 0, 0, 0), 0, 1),  # a pixel, without plus_one nothing
        ((0, 0, 10, 10), (30, 30, 10, 10), 0, 0),  # right lies left of left
        ((30, 30, 10, 10), (30, 30, 10, 10), 0, 0),
        ((-5, -5, 5, 5), (-5, -5, 5, 5), 1, 1),
    ],
)
def test_intersection_over_union(a, b, plain, plus_one):
    assert box_iou(a, b) == box_iou(b, a) == pytest.approx(plain)
    assert box_iou(a, b, plus_one=True) == pytest.approx(plus_one)
    assert box_iou(np.array(a), list(b)) == pytest.approx(plain)


@pytest.mark.parametrize(
    "box", [None, "1234", (1, 2, 3), (1, 2, 3, 4, 5), (1, 2, 3, None), (1, 2, 3, math.nan), 7]
)
def test_an_invalid_box_is_refused(box):
    with pytest.raises(ValueError, match="expected 4 numbers"):
        box_iou(box, (0, 0, 1, 1))


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("{<10><20><30><100>}", (0.1, 0.2, 0.3, 1)),
        (" { <10> <20><30> <100> } ", (0.1, 0.2, 0.3, 1)),
        ("<unk>{<10><20><30><100>}</s>", (0.1, 0.2, 0.3, 1)),
        ("{<1 0><20><3<unk>0><100>}", (0.1, 0.2, 0.3, 1)),
        ("{<10><20><30><100>} 7", None),
        ("{<10><20><30><100>} yes", (0.1, 0.2, 0.3, 1)),
        ("{<10><20><30><100>}7", None),
        ("{<10><20><30><100>}<delim>{<1><1><2><2>}", None),
        ("the {<10><20><30><100>}", None),
        ("{<10><20><30>}", None),
        ("{<10><20><30><1000>}", None),
        ("{<-1><20><30><100>}", None),
        ("{<1.5><20><30><100>}", None),
        ("{10,20,30,100}", None),
        ("<10><20><30><100>", None),
        ("{<10><20><30><100>", None),
        ("", None),
        ("箱", None),
    ],
)
def test_the_box_of_an_answer(text, box):
    assert parse_box(text) == (pytest.approx(box) if box else None)


def accuracy(answer, box, size, resolution=100):
    return box_accuracy([answer], [box], [size], resolution)["accuracy"]


def test_accuracy_needs_more_than_a_half_with_a_pixel_added():
    # ground truth (0, 0, 9, 9); the answer (0, 0, 9, 4) covers exactly half of its 100 pixels
    assert accuracy("{<0><0><9><4>}", (0, 0, 9, 9), (100, 100)) == 0
    # ground truth (0, 0, 10, 10), answer (0, 0, 10, 5): 66 of 121 pixels, or exactly half without the added pixel
    assert accuracy("{<0><0><10><5>}", (0, 0, 10, 10), (100, 100)) == 1


def test_boxes_are_scaled_by_the_image():
    assert accuracy("{<50><50><100><100>}", (320, 240, 320, 240), (640, 480)) == 1
    assert accuracy("{<50><50><100><100>}", (320, 240, 320, 240), (480, 640)) == 0
    assert (
        accuracy("{<500><500><999><999>}", (320, 240, 320, 240), (640, 480), resolution=1000) == 1
    )


def test_unparsable_answers_are_wrong_and_counted():
    answers = {"a": "{<0><0><100><100>}", "b": "I do not know", "c": "", "d": "{<0><0><9><9>}"}
    figures = box_accuracy(
        answers, dict.fromkeys("abcd", (0, 0, 64, 48)), dict.fromkeys("abcd", (64, 48))
    )
    assert figures["accuracy"] == 0.25 and figures["unparsable"] == 2 and figures["count"] == 4
    assert figures["iou"] == pytest.approx({"a": 1, "b": 0, "c": 0, "d": (6.76 * 5.32) / (65 * 49)})


@pytest.mark.parametrize(
    ("answers", "boxes", "sizes", "message"),
    [
        ({1: ""}, {2: (0, 0, 1, 1)}, {2: (1, 1)}, "1 without boxes: 1"),
        ({1: ""}, {1: (0, 0, 1, 1)}, {}, "without an answer: 1|without sizes"),
        ([], [], [], "no answer to score"),
        ([None], [(0, 0, 1, 1)], [(1, 1)], "answer of 0: found null"),
        ([""], [None], [(1, 1)], "box of 0: found None; expected 4 numbers"),
        ([""], [(0, 0, 1, 1)], [None], "size of 0: found None; expected 2 numbers"),
        ([""], [(0, 0, 1, 1)], [(1, 1, 3)], "size of 0: .* expected 2 numbers"),
    ],
)
def test_input_that_cannot_be_scored_is_refused(answers, boxes, sizes, message):
    with pytest.raises(ValueError, match=message):
        box_accuracy(answers, boxes, sizes)


numbers = st.integers(-20, 20)
boxes = st.tuples(numbers, numbers, numbers, numbers)


@settings(max_examples=200, deadline=None)
@given(boxes, boxes, st.booleans(), numbers)
def test_iou_is_symmetric_and_moves_with_the_boxes(a, b, plus_one, offset):
    value = box_iou(a, b, plus_one)
    assert 0 <= value <= 1 and value == box_iou(b, a, plus_one)
    moved = [[number + offset for number in box] for box in (a, b)]
    assert box_iou(*moved, plus_one) == value


@pytest.mark.parametrize(
    ("answer", "box", "by_release", "common"),
    [
        ("{<0><0><1><3>}", (0, 0, 2, 4), 1.0, 0.0),  # 8 of 15 inclusive pixels, 3 of 8 others
        ("{<0><0><2><4>}", (0, 0, 4, 4), 1.0, 1.0),  # 15 of 25, and just a half
        ("{<0><0><1><4>}", (0, 0, 4, 4), 0.0, 0.0),
        ("a cup", (0, 0, 4, 4), 0.0, 0.0),
    ],
)
def test_the_common_rule_adds_no_pixel_and_accepts_exactly_a_half(answer, box, by_release, common):
    settings = ([answer], [box], [(100, 100)])
    assert box_accuracy(*settings)["accuracy"] == by_release
    assert box_accuracy(*settings, is_common=True)["accuracy"] == common
