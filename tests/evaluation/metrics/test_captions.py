"""CIDEr-D, BLEU and ROUGE-L against the output of pycocoevalcap 1.2, the papers' examples, and values by hand."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4.evaluation.metrics import bleu, bleu_counts, bleu_of, caption_words, cider_d, rouge_l

REFERENCES = {
    "kite": ["a girl flies a kite on the beach", "a child with a red kite by the sea"],
    "bus": [
        "a bus stops at the corner",
        "two people get on a yellow bus",
        "a yellow bus in a street",
    ],
    "cake": ["a cake with five candles"],
}
CLOSE = {
    "kite": "a girl with a red kite on the beach",
    "bus": "a yellow bus stops in a street",
    "cake": "a cake with candles",
}
SWAPPED = {
    "kite": "a cake with five candles",
    "bus": "a girl flies a kite",
    "cake": "two people get on a bus",
}
REPEATS = {
    "kite": "kite kite kite kite",
    "bus": "a yellow bus in a street in a street in a street",
    "cake": "",
}

# name: answers, CIDEr-D overall and per item, BLEU-1 to 4, ROUGE-L overall and per item
PRINTED_BY_THE_LIBRARY = {
    "close": (
        CLOSE,
        (3.756604, [3.8174, 2.9876, 4.4648]),
        [0.951229, 0.863227, 0.707677, 0.497573],
        (0.879950, [0.8324, 0.9361, 0.8714]),
    ),
    "swapped": (
        SWAPPED,
        (0.011176, [0.0335, 0, 0]),
        [0.259072, 0, 0, 0],
        (0.271445, [0.2717, 0.3578, 0.1848]),
    ),
    "repeats": (
        REPEATS,
        (0.482740, [0.2172, 1.2310, 0]),
        [0.340725, 0.307848, 0.290843, 0.275348],
        (0.288840, [0.1572, 0.7093, 0]),
    ),
}


@pytest.mark.parametrize("name", PRINTED_BY_THE_LIBRARY)
def test_figures_are_those_of_pycocoevalcap(name):
    answers, cider, bleus, rouge = PRINTED_BY_THE_LIBRARY[name]
    mean, each = cider_d(REFERENCES, answers)
    assert mean == pytest.approx(cider[0], abs=5e-7)
    assert [each[item] for item in ("kite", "bus", "cake")] == pytest.approx(cider[1], abs=5e-5)
    assert bleu(REFERENCES, answers) == pytest.approx(bleus, abs=5e-7)
    mean, each = rouge_l(REFERENCES, answers)
    assert mean == pytest.approx(rouge[0], abs=5e-7)
    assert [each[item] for item in ("kite", "bus", "cake")] == pytest.approx(rouge[1], abs=5e-5)


def test_unicode_as_pycocoevalcap():
    references = {1: ["ein grüner Käfer auf 草", "das Café"], 2: ["日本 の 猫"]}
    answers = {1: "ein grüner Käfer auf 草", 2: "日本 の 犬"}
    assert cider_d(references, answers)[1] == pytest.approx({1: 5.0, 2: 2.9167}, abs=5e-5)
    assert bleu(references, answers) == pytest.approx(
        [0.875, 0.853913, 0.817767, 0.859948], abs=5e-7
    )
    assert rouge_l(references, answers)[1] == pytest.approx({1: 1.0, 2: 0.6667}, abs=5e-5)


def test_cider_d_by_hand():
    # a single word, equal: of n = 1..4 only n = 1 has n-grams, with cosine 1, so 10 / 4
    assert cider_d({1: ["dog"], 2: ["cat"]}, {1: "dog", 2: "cat"}) == (2.5, {1: 2.5, 2: 2.5})
    # Four words have n-grams for each n: the reference itself scores 10.
    assert cider_d([["a b c d"], ["e f g h"]], ["a b c d", "e"])[1][0] == pytest.approx(10)
    # the reference twice: half of the unigrams are clipped, and n-grams across the joint are in no reference
    cosines = [1 / 2, 3 / math.sqrt(3 * 13), 2 / math.sqrt(2 * 10), 1 / math.sqrt(7)]
    twice = cider_d([["w x y z"], ["e f"]], ["w x y z w x y z", "e f"])[1][0]
    assert twice == pytest.approx(10 * sum(cosines) / 4 * math.exp(-(4**2) / 72))


def test_cider_d_of_one_item_is_0():
    assert cider_d({1: ["a dog runs", "the dog"]}, {1: "a dog runs"}) == (0.0, {1: 0.0})


def test_cider_d_depends_on_all_items():
    # "a" is in a reference of every item and weighs nothing, "dog" does in the second call
    assert cider_d([["a dog"], ["a cat"]], ["a", "x"])[0] == 0
    assert cider_d([["dog a"], ["dog a"], ["x"]], ["dog", "dog", "y"])[0] > 0


@pytest.mark.parametrize(
    ("answer", "right", "said"),
    [
        # Papineni et al. 2002, Bleu, examples 1 and 2: modified precisions of n = 1, 2
        (
            "it is a guide to action which ensures that the military always obeys the commands of the party",
            [17, 10],
            [18, 17],
        ),
        (
            "it is to insure the troops forever hearing the activity guidebook that party direct",
            [8, 1],
            [14, 13],
        ),
    ],
)
def test_bleu_counts_of_the_examples_in_its_paper(answer, right, said):
    references = [
        "it is a guide to action that ensures that the military will forever heed party commands",
        "it is the guiding principle which guarantees the military forces always being under the command of the party",
        "it is the practical guide for the army always to heed the directions of the party",
    ]
    counts = bleu_counts([references], [answer])[0]
    assert counts[2:4].tolist() == right and counts[6:8].tolist() == said
    if len(answer.split()) == 18:  # as long as the second reference: no penalty
        assert bleu([references], [answer])[:2] == pytest.approx(
            [17 / 18, math.sqrt(17 / 18 * 10 / 17)]
        )


def test_bleu_clips_repeated_words_as_in_its_paper():
    answer = "the the the the the the the"
    references = ["the cat is on the mat", "there is a cat on the mat"]
    assert bleu([references], [answer])[0] == pytest.approx(2 / 7)


def test_bleu_takes_the_reference_closest_in_length_or_the_shorter_of_two():
    assert bleu_counts([["a b", "a b c d"]], ["a b c"])[0][:2].tolist() == [3, 2]
    assert bleu([["a b c d", "x"]], ["a b c"])[0] == pytest.approx(math.exp(1 - 4 / 3))


def test_bleu_of_several_items_is_computed_from_their_summed_counts():
    counts = bleu_counts(REFERENCES, CLOSE)
    assert bleu_of(sum(counts.values())) == bleu(REFERENCES, CLOSE)
    assert bleu_of(counts["kite"]) == bleu({"kite": REFERENCES["kite"]}, {"kite": CLOSE["kite"]})
    assert bleu(REFERENCES, CLOSE)[3] != pytest.approx(
        sum(bleu_of(each)[3] for each in counts.values()) / 3
    )


@pytest.mark.parametrize(
    ("answer", "value"),
    # Lin 2004, ROUGE, section 3: sentences S2 to S4 against S1
    [
        ("police kill the gunman", 0.75),
        ("the gunman kill police", 0.5),
        ("the gunman police killed", 0.5),
    ],
)
def test_rouge_l_of_the_examples_in_its_paper(answer, value):
    assert rouge_l([["police killed the gunman"]], [answer])[0] == pytest.approx(value)


def test_rouge_l_combines_the_best_precision_and_the_best_recall():
    # precision 1/2 with both references, recall 1 with the first and 1/4 with the second
    f = (1 + 1.44) * 0.5 * 1 / (1 + 1.44 * 0.5)
    assert rouge_l([["dog", "dog in the park"]], ["big dog"])[0] == pytest.approx(f)


@pytest.mark.parametrize("metric", [cider_d, rouge_l])
def test_empty_answers_and_empty_references_score_0(metric):
    assert metric([["a dog"], ["a cat"]], ["", " \n"]) == (0.0, {0: 0.0, 1: 0.0})
    assert metric([[""], ["a cat"]], ["", ""])[0] == 0.0


def test_bleu_of_empty_answers_is_0():
    assert bleu([["a dog"], ["a cat"]], ["", ""]) == [0, 0, 0, 0]
    assert bleu([[""]], [""]) == pytest.approx([0] * 4, abs=1e-3)


def test_a_single_item_equal_to_its_reference():
    # as pycocoevalcap prints: three words have no n-gram of four
    assert bleu([["a dog runs", "the dog"]], ["a dog runs"]) == pytest.approx(
        [1, 1, 1, 0.031623], abs=5e-7
    )
    assert rouge_l([["a dog runs", "the dog"]], ["a dog runs"])[0] == 1


def test_a_tokenizer_is_used_for_answers_and_references():
    references, answers = [["A dog, running."], ["Two cats!"]], ["a dog running", "TWO CATS"]
    assert rouge_l(references, answers)[0] < 0.5
    assert rouge_l(references, answers, caption_words)[0] == 1
    assert bleu(references, answers, caption_words)[1] == pytest.approx(1)
    assert cider_d(references, answers, caption_words)[0] > 0 == cider_d(references, answers)[1][1]


@pytest.mark.parametrize("metric", [cider_d, bleu, rouge_l])
@pytest.mark.parametrize(
    ("references", "answers", "message"),
    [
        ({1: ["a"], 2: ["b"]}, {1: "a"}, "1 without an answer: 2"),
        ({1: ["a"]}, {1: "a", 2: "b"}, "1 without references: 2"),
        ({1: ["a"]}, {"1": "a"}, "1 without references: '1'; 1 without an answer: 1"),
        ({1: []}, {1: "a"}, "references of 1: there is none"),
        ({1: "a dog"}, {1: "a"}, "references of 1: found str; expected a list of texts"),
        ({1: None}, {1: "a"}, "references of 1: found null"),
        ({1: ["a", None]}, {1: "a"}, "references of 1: found null; expected text"),
        ({1: ["a"]}, {1: None}, "answer of 1: found null; expected text"),
        ({1: ["a"]}, {1: ["a"]}, "answer of 1: found list; expected text"),
        ({}, {}, "no answer to score"),
        (None, {1: "a"}, "references: found null"),
        ([["a"], ["b"]], ["a"], "1 without an answer: 1"),
    ],
)
def test_input_that_cannot_be_scored(metric, references, answers, message):
    with pytest.raises(ValueError, match=message):
        metric(references, answers)


texts = st.text(alphabet="ab ", max_size=12)
items = st.lists(st.tuples(st.lists(texts, min_size=1, max_size=3), texts), min_size=1, max_size=5)


@settings(max_examples=150, deadline=None)
@given(items, st.randoms(use_true_random=False))
def test_scores_are_in_their_range_and_do_not_depend_on_the_order(pairs, random):
    references = dict(enumerate(pair[0] for pair in pairs))
    answers = dict(enumerate(pair[1] for pair in pairs))
    shuffled = list(references)
    random.shuffle(shuffled)
    other_way = {item: references[item][::-1] for item in shuffled}
    for metric, top in ((cider_d, 10), (rouge_l, 1)):
        mean, each = metric(references, answers)
        assert 0 <= mean <= top + 1e-9 and all(0 <= value <= top + 1e-9 for value in each.values())
        assert metric(other_way, answers)[0] == pytest.approx(mean, abs=1e-12)
    values = bleu(references, answers)
    assert all(0 <= value <= 1 for value in values)
    assert bleu(other_way, answers) == values


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcde"), min_size=4, max_size=9), min_size=2, max_size=4))
def test_the_reference_itself_is_the_best_answer(sentences):
    answers = [" ".join(words) for words in sentences]
    references = [[answer] for answer in answers]
    assert bleu(references, answers) == pytest.approx([1, 1, 1, 1])
    assert rouge_l(references, answers)[0] == pytest.approx(1)
    # Each item scores 10, or less if all its n-grams of some n are in every item.
    assert max(cider_d(references, answers)[1].values()) <= 10 + 1e-9
