"""CHAIR: which objects a text mentions, and the fraction of wrong ones."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4.evaluation.metrics import (
    chair,
    chair_counts,
    chair_of,
    mentioned_objects,
    read_synonyms,
)
from minigpt4.evaluation.metrics.chair import NO_OBJECT, own_synonyms

ANSWERS = {
    1: "A dog catches a frisbee that a man has thrown.",
    2: "A cat.",
    3: "A car, another car and a truck.",
    4: "Clouds over the sea.",
}
OBJECTS = {1: ["dog", "frisbee"], 2: ["cat"], 3: ["car"], 4: []}


def test_repeated_mentions_count():
    figures = chair(ANSWERS, OBJECTS)
    assert figures["CHAIRs"] == 0.5 and figures["CHAIRi"] == pytest.approx(2 / 7)
    assert figures["wrong"] == {1: ["person"], 2: [], 3: ["truck"], 4: []}
    assert (
        figures["mentions"],
        figures["wrong_mentions"],
        figures["count"],
        figures["recall"],
    ) == (7, 2, 4, 1)


def test_what_the_reference_captions_mention_is_present_too():
    captions = {
        1: ["someone plays with a dog", "A boy and his dog"],
        2: ["cat"],
        3: ["pickups"],
        4: ["the sea"],
    }
    figures = chair(ANSWERS, OBJECTS, captions)
    assert (figures["CHAIRs"], figures["CHAIRi"]) == (0, 0)


@pytest.mark.parametrize(
    ("text", "share_of_answers", "share_of_mentions", "recall"),
    [
        ("", 0, 0, 0),  # silence has no wrong mention, but no recall
        ("a dog", 0, 0, 0.5),
        ("A CAT and a dog", 1, 0.5, 0.5),
        ("cats, cats, cats and a dog. A kitten sits by the bowl", 1, 4 / 6, 1),
    ],
)
def test_one_item(text, share_of_answers, share_of_mentions, recall):
    figures = chair([text], [["dog", "bowl"]])
    assert (figures["CHAIRs"], figures["CHAIRi"], figures["recall"]) == (
        share_of_answers,
        share_of_mentions,
        recall,
    )


@pytest.mark.parametrize(
    ("text", "names"),
    [
        # the result of LisaAnne/Hallucination's utils/chair.py, with its own synonyms too
        ("A baby elephant and an adult elephant walking", ["elephant", "elephant"]),
        ("a passenger jet, two baby birds", ["airplane", "bird"]),
        ("toilets with seats up", ["toilet"]),
        ("toiletries on a seat", ["chair"]),
        ("the toilet seat", ["toilet"]),
        ("hot dogs and wine glasses", ["hot dog", "wine glass"]),
        ("A man riding a wave on top of a surfboard.", ["person", "surfboard"]),
        (
            "Men and women sit at tables with knives, forks",
            ["person", "person", "dining table", "knife", "fork"],
        ),
        ("Two teddy bears, a child's toy lie on the couch", ["teddy bear", "person", "couch"]),
        ("an old-fashioned clock", ["clock"]),
        ("a bow tie; ties", ["tie", "tie"]),
        (
            "policemen, policewomen on buses, mice, geese, oxen",
            ["person", "person", "bus", "mouse", "bird", "cow"],
        ),
        ("a baby, bears", ["person", "bear"]),  # no phrase reaches over a comma
        ("scissors and skis", ["scissors", "skis"]),
        ("Sheep!", ["sheep"]),
        ("carpet, scarf, catalogue, busy, education", []),
        ("", []),
        ("犬 😀", []),
        # our own table only: one object is one mention, and a station is not a train
        ("a pickup truck", ["truck"]),
        ("a red double-decker bus", ["bus"]),
        ("hot-dog", ["hot dog"]),
        ("the train station", []),
    ],
)
def test_mentioned_objects(text, names):
    assert mentioned_objects(text) == names


@pytest.mark.parametrize("text", ["a hot-dog", "a cat/dog", "cat/dog/hot-dog"])
def test_joined_words_are_unknown_words_with_the_authors_synonyms(text):
    """As in their chair.py, where nltk splits neither at hyphens nor at slashes."""
    assert mentioned_objects(text)
    assert mentioned_objects(text, own_synonyms()) == []
    assert chair(["a cat"], [[]], [[text]], own_synonyms())["CHAIRs"] == 1
    assert mentioned_objects(f"{text}, a cat", own_synonyms()) == ["cat"]


def test_a_synonym_table_of_the_users_own(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text(
        "person, girl, rider\nbicycle, bike\n\ntraffic light, street light\n", encoding="utf-8"
    )
    table = read_synonyms(path)
    assert table == {
        "person": ["girl", "rider"],
        "bicycle": ["bike"],
        "traffic light": ["street light"],
    }
    assert mentioned_objects("Girls on bikes by street lights, dogs", table) == [
        "person",
        "bicycle",
        "traffic light",
    ]
    assert chair(["a rider"], [["bicycle"]], synonyms=table)["CHAIRs"] == 1
    with pytest.raises(ValueError, match="objects of 0: 'dog' has no entry in the synonyms"):
        chair(["a rider"], [["dog"]], synonyms=table)


def test_a_word_with_an_entry_is_not_taken_for_a_plural_of_another():
    for table in ({"a": ["pen"], "b": ["pens"]}, {"b": ["pens"], "a": ["pen"]}):
        assert mentioned_objects("pen pens", table) == ["a", "b"]


@pytest.mark.parametrize("text", ["", "\n\n", "person girl\n"])
def test_a_file_without_synonyms(tmp_path, text):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=r"list.txt' has no line \"name, synonym, ..\""):
        read_synonyms(tmp_path / "list.txt")


def test_our_table_has_the_80_objects_and_no_word_twice():
    table = own_synonyms()
    assert len(table) == 81 and NO_OBJECT in table
    words = [word for name, others in table.items() for word in (name, *others)]
    assert len(words) == len(set(words))
    # Each name means its own object, in the plural too.
    for name, others in table.items():
        for word in (name, *others):
            assert mentioned_objects(f"the {word}") == ([] if name == NO_OBJECT else [name])
            assert mentioned_objects(json.dumps(word.upper())) == mentioned_objects(word)


@pytest.mark.parametrize(
    ("answers", "objects", "references", "message"),
    [
        ({1: "a"}, {2: []}, None, "1 without objects: 1; 1 without an answer: 2"),
        ({}, {}, None, "no answer to score"),
        ([None], [[]], None, "answer of 0: found null"),
        (["a"], [None], None, "objects of 0: found None; expected a list of names"),
        (["a"], ["dog"], None, "objects of 0: found 'dog'; expected a list of names"),
        (["a"], [["unicorn"]], None, "objects of 0: 'unicorn' has no entry in the synonyms"),
        (["a"], [[None]], None, "objects of 0: found null"),
        (["a"], [[]], [], "1 without an answer|without references"),
        (["a"], [[]], [[]], "references of 0: there is none"),
        (["a"], [[]], ["a dog"], "references of 0: found str"),
    ],
)
def test_input_that_cannot_be_scored_is_refused(answers, objects, references, message):
    with pytest.raises(ValueError, match=message):
        chair(answers, objects, references)


words = st.lists(
    st.sampled_from(["a", "dog", "dogs", "cat", "hot dog", "baby", "seat", "toilet", ","]),
    max_size=8,
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(words, st.sets(st.sampled_from(["dog", "cat", "person"]))), min_size=1, max_size=5
    )
)
def test_the_metrics_are_computed_from_the_summed_counts(items):
    answers, objects = [" ".join(item[0]) for item in items], [sorted(item[1]) for item in items]
    figures = chair(answers, objects)
    counts = chair_counts(answers, objects)
    assert figures == chair_of(sum(counts.values())) | {"wrong": figures["wrong"]}
    assert figures["wrong_mentions"] == sum(map(len, figures["wrong"].values()))
    assert (figures["CHAIRs"] > 0) == (figures["CHAIRi"] > 0)
