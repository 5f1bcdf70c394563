"""VQAv2's accuracy and exact match."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4.evaluation.metrics import exact_match, vqa_accuracy
from minigpt4.evaluation.metrics.vqa import normalise_answer, normalise_punctuation

COWS = ["cow"] * 10


@pytest.mark.parametrize(
    ("number", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (7, 1), (10, 1)]
)
def test_accuracy_by_how_many_of_ten_annotators_agree(number, accuracy):
    assert vqa_accuracy("dog", ["dog"] * number + COWS[number:]) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    ("answer", "people", "accuracy"),
    # the results of GT-Vision-Lab/VQA's vqaEval.py
    [
        ("2", ["2", "two", "2", "3", "4", "5", "6", "7", "8", "9"], 0.6),  # people's "two" stays
        ("two", ["two"] * 10, 0),  # the answer has become "2"
        ("two", ["2"] * 10, 1),
        # of the human answers "dog." loses its period, but "a dog" keeps its article
        ("The dog!", ["dog", "a dog", "dog", "dog.", *COWS[4:]], 0.9),
        ("coca-cola", ["coca cola"] * 3 + ["coke"] * 7, 0.9),
        ("coca-cola", ["coca-cola"] * 10, 0),  # unanimous people are not normalised
        ("coca-cola", ["coca-cola"] * 9 + ["coke"], 1),
        ("dont know", ["don't know"] * 2 + ["dont know"] * 8, 0.6),
        ("1,000", ["1,000"] * 4 + ["1000"] * 6, 1),
        ("U.S.A.", ["usa"] * 2 + ["no"] * 8, 0.6),
        ("Yes", ["yes", "yes", "no"], 0.4444444444444444),
        ("yes", ["yes"], 0),  # a single person has no others
        ("", ["", "", "", "", "no"], 1),
        ("日本", ["日本"] * 4 + COWS[4:], 1),
        ("Café\n", ["café"] * 2 + COWS[2:], 0.6),
    ],
)
def test_accuracy_is_that_of_the_official_code(answer, people, accuracy):
    assert vqa_accuracy(answer, people) == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("1,000", "1000"),
        ("two", "2"),
        ("None", "0"),
        ("a dog", "dog"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),  # as the official table has it
        ("Im", "im"),  # its capitals never match a word in lower case
        ("what? yes!", "what yes"),
        ("10:30", "10:30"),
        ("3.5", "3.5"),
        ("no.", "no"),
        ("x_y", "x y"),
        ("a man, a dog", "man dog"),
        ("$5", "$5"),
        ("the", ""),
        ("", ""),
        ("one\ttwo\nthree", "1 2 3"),
    ],
)
def test_normalised_answers(text, normal):
    assert normalise_answer(text) == normal


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("isn't it?", "isn't it "),
        ("two-and a half", "two and a half"),
        ("1,000 x-y", "1000 xy"),
        ("a , b,c", "a  bc"),
        ("U.S.A.", "USA"),
        (".5", ".5"),
        ("The", "The"),
    ],
)
def test_normalised_punctuation(text, normal):
    assert normalise_punctuation(text) == normal


@pytest.mark.parametrize(
    ("answer", "people", "message"),
    [
        (None, ["a"], "answer: found null; expected text"),
        ("a", [], "human_answers: there is none"),
        ("a", None, "human_answers: found null"),
        ("a", "a dog", "human_answers: found str; expected a list of texts"),
        ("a", [{"answer": "a"}], "human_answers: found dict; expected text"),
        ("a", ["a", None], "human_answers: found null; expected text"),
    ],
)
def test_invalid_answers_are_refused(answer, people, message):
    with pytest.raises(ValueError, match=message):
        vqa_accuracy(answer, people)


@pytest.mark.parametrize(
    ("answer", "label", "value"),
    [
        ("yes", "yes", 1),
        ("Yes.", "yes", 1),
        (" The  table\n", "the table", 1),
        ("T-shirt", "tshirt", 1),
        ("CAFÉ", "café", 1),
        ("yes, it is", "yes", 0),
        ("", "yes", 0),
        ("", "", 1),
        ("", "?", 0),
        ("!", "?", 0),
        ("? ", "?", 1),
        ("2", "two", 0),
    ],
)
def test_exact_match(answer, label, value):
    assert exact_match(answer, label) == value


@pytest.mark.parametrize(("answer", "label"), [(None, "yes"), ("yes", None), ("1", 1)])
def test_exact_match_refuses_what_is_not_text(answer, label):
    with pytest.raises(ValueError, match="expected text"):
        exact_match(answer, label)


short = st.text(alphabet="ab 1,.-two'", max_size=8)


@settings(max_examples=300, deadline=None)
@given(short, st.lists(short, min_size=1, max_size=10), st.randoms(use_true_random=False))
def test_accuracy_is_0_to_1_and_does_not_depend_on_the_order(answer, people, random):
    value = vqa_accuracy(answer, people)
    random.shuffle(people)
    assert 0 <= value <= 1 and vqa_accuracy(answer, people) == value
