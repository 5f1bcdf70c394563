"""POPE and MME: the results of the official scripts, and unparsable answers of all kinds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4.evaluation.metrics import MMEQuestion, mme, pope, pope_counts, pope_of
from minigpt4.evaluation.metrics.yes_no import mme_answer, pope_answer

LABELS = ["yes", "no"] * 50


@pytest.mark.parametrize(
    ("answer", "accuracy", "precision", "recall", "f1", "yes_ratio", "unparsable"),
    [
        ("Yes", 0.5, 0.5, 1, 0.6667, 1, 0),
        ("No", 0.5, 0, 0, 0, 0, 0),  # the official script divides by zero here
        ("", 0.5, 0.5, 1, 0.6667, 1, 100),
        ("I cannot see the image", 0.5, 0.5, 1, 0.6667, 1, 100),
    ],
)
def test_pope_with_the_same_answer_to_all_questions(
    answer, accuracy, precision, recall, f1, yes_ratio, unparsable
):
    figures = pope([answer] * 100, LABELS)
    expected = {
        "accuracy": accuracy,
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes_ratio": yes_ratio,
    }
    assert figures == pytest.approx(expected | {"unparsable": unparsable, "count": 100}, abs=5e-5)


def test_pope_of_mixed_answers_as_its_script_prints():
    answers = [
        "Yes, there is a dog.",
        "No",
        "There is no cup. Yes",
        "NO!",
        "",
        "It is not clear",
        "Yes",
        "not sure, yes",
    ]
    labels = ["yes", "no", "yes", "no", "yes", "yes", "no", "no"]
    figures = pope(dict(enumerate(answers)), dict(enumerate(labels)))
    official = {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes_ratio": 0.5}
    assert figures == official | {"unparsable": 2, "count": 8}


def test_the_yes_ratio_is_that_of_the_answers():
    figures = pope(["Yes", "Yes", "Yes", "No"], ["yes", "no", "no", "no"])
    assert figures["yes_ratio"] == 0.75 and figures["accuracy"] == 0.5
    assert (figures["precision"], figures["recall"], figures["f1"]) == pytest.approx(
        (1 / 3, 1, 0.5)
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"),
        ("No.", "no"),
        ("no", "no"),
        ("No, there is not", "no"),
        ("There is not, a dog", "no"),
        ("It is there. No", "yes"),  # only the first sentence is read
        (". No", "yes"),
        ("NO", "yes"),  # neither No nor no
        ("no!", "yes"),
        ("No\nyes", "yes"),  # split at blanks only
        ("nothing", "yes"),
        ("", "yes"),
        ("いいえ", "yes"),
    ],
)
def test_how_pope_parses_an_answer(text, said):
    assert pope_answer(text) == said


def test_unparsable_answers_are_those_that_say_neither():
    answers = ["YES!", "yes", "no", "NO", "no!", "maybe. yes", "", "eyes"]
    assert [int(count[4]) for count in pope_counts(answers, ["no"] * 8).values()] == [
        0,
        0,
        0,
        1,
        1,
        1,
        1,
        1,
    ]


def test_pope_of_one_item():
    assert pope(["Yes"], ["yes"])["f1"] == 1
    assert pope(["No"], ["no"]) == {
        "accuracy": 1,
        "precision": 0,
        "recall": 0,
        "f1": 0,
        "yes_ratio": 0,
        "unparsable": 0,
        "count": 1,
    }


@pytest.mark.parametrize(
    ("answers", "labels", "message"),
    [
        ({1: "yes"}, {2: "yes"}, "1 without labels: 1; 1 without an answer: 2"),
        (["yes"], ["yes", "no"], "1 without an answer: 1"),
        ([], [], "no answer to score"),
        ([None], ["yes"], "answer of 0: found null"),
        (["yes"], [None], "label of 0: found null"),
        (["yes"], ["maybe"], "label of 0: found 'maybe'; expected yes or no"),
        ("yes", "yes", "answers: found str; expected a mapping"),
    ],
)
def test_pope_refuses_what_cannot_be_scored(answers, labels, message):
    with pytest.raises(ValueError, match=message):
        pope(answers, labels)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["Yes", "No", "no, no", ""]), st.sampled_from(["yes", "no"])),
        min_size=1,
    )
)
def test_pope_is_computed_from_its_counts(pairs):
    answers, labels = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    figures = pope(answers, labels)
    assert figures == pope_of(sum(pope_counts(answers, labels).values()))
    right = sum(pope_answer(answer) == label for answer, label in pairs)
    assert figures["accuracy"] == right / len(pairs)
    if figures["precision"] and figures["recall"]:
        harmonic = 2 / (1 / figures["precision"] + 1 / figures["recall"])
        assert figures["f1"] == pytest.approx(harmonic)


def questions(*rows):
    return {number: MMEQuestion(*row) for number, row in enumerate(rows)}


PAIR = questions(("existence", "1.jpg", "Yes"), ("existence", "1.jpg", "No"))


@pytest.mark.parametrize(
    ("said", "score"),
    [
        (("Yes", "No"), 200),
        (("Yes", "Yes"), 50),
        (("No", "No"), 50),
        (("No", "Yes"), 0),
        (("", ""), 0),
    ],
)
def test_mme_of_one_image(said, score):
    figures = mme(dict(enumerate(said)), PAIR)
    assert figures["perception"] == figures["subtasks"]["existence"]["score"] == score
    assert figures["cognition"] == 0 and figures["unparsable"] == said.count("")


def test_mme_as_lmms_eval_prints():
    asked = questions(
        ("existence", "1.jpg", "Yes"),
        ("existence", "1.jpg", "No"),
        ("existence", "2.jpg", "Yes"),
        ("existence", "2.jpg", "No"),
        ("color", "1.jpg", "Yes"),
        ("color", "1.jpg", "No"),
        ("code_reasoning", "1.jpg", "Yes"),
        ("code_reasoning", "1.jpg", "No"),
    )
    said = ["Yes", "No.", "It is a yes", "no, it is not", "y", "Yes", "Yes it is", "N."]
    figures = mme(dict(enumerate(said)), asked)
    assert (figures["perception"], figures["cognition"], figures["unparsable"]) == (175, 200, 1)
    assert figures["subtasks"]["existence"] == {
        "score": 125,
        "accuracy": 0.75,
        "accuracy_plus": 0.5,
    }
    assert figures["subtasks"]["color"] == {"score": 50, "accuracy": 0.5, "accuracy_plus": 0}


def test_mme_with_every_answer_right_is_2000_and_800():
    from minigpt4.evaluation.metrics.yes_no import COGNITION, PERCEPTION

    asked = {}
    for subtask in PERCEPTION + COGNITION:
        for label in ("Yes", "No"):
            asked[f"{subtask} {label}"] = (subtask, "same.png", label)
    figures = mme({item: item.split()[1] for item in asked}, asked)
    assert (figures["perception"], figures["cognition"]) == (2000, 800)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"),
        (" yes.", "yes"),
        ("No way", "no"),
        ("y", "yes"),
        ("N.", "no"),
        ("Yes, no", "yes"),
        ("not", "no"),
        ("I know", "other"),
        ("eyes", "yes"),  # within the first four letters, wherever
        ("it is yes", "other"),
        ("", "other"),
        ("да", "other"),
    ],
)
def test_how_mme_parses_an_answer(text, said):
    assert mme_answer(text) == said


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            questions(("existence", "1.jpg", "Yes")),
            "existence: image '1.jpg' has 1 questions; MME asks two",
        ),
        (questions(*[("existence", "1.jpg", "Yes")] * 3), "has 3 questions"),
        (questions(("existance", "1.jpg", "Yes")), "unknown subtask 'existance'"),
        (questions(("existence", "1.jpg", "maybe")), "expected yes or no"),
        ({0: None}, r"question of 0: expected \(subtask, image, label\)"),
        ({}, "no answer to score"),
    ],
)
def test_mme_refuses_what_cannot_be_scored(asked, message):
    with pytest.raises(ValueError, match=message):
        mme(dict.fromkeys(asked, "Yes"), asked)
