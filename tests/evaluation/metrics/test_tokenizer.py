"""Words of captions, against the output of Stanford's PTBTokenizer 3.4.1 and coco-caption's punctuation list."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4.evaluation.metrics import CAPTION_TOKENIZER, caption_words

PRINTED_BY_COCO_CAPTION = {
    "A man's T-shirt (red), isn't it?": "a man 's t-shirt -lrb- red -rrb- is n't it",
    "He can't/won't go... cannot gonna": "he ca n't / wo n't go can not gon na",
    '$5 50% 3.5 1,000 "quoted" e.g. i.e.': "$ 5 50 % 3.5 1,000 quoted e.g. i.e.",
    "black/white dog & cat # 1 a_b x=y [brackets]": "black/white dog & cat # 1 a_b x = y -lsb- brackets -rsb-",
    "10:30 a.m. p.m. 1/2": "10:30 a.m. p.m. 1/2",
    "it’s “curly” – en — em … ellipsis café naïve 日本語 😀 wow!! what?!": (
        "it 's curly en em ellipsis café naïve 日本語 wow !! what ?!"
    ),
    "well-known semi;colon a--b a - b": "well-known semi colon a b a b",
    "I'm we're they've he'll she'd o'clock": "i 'm we 're they 've he 'll she 'd o'clock",
    "Mr. and Mrs. Smith's dogs' 3-year-old boy.": "mr. and mrs. smith 's dogs 3-year-old boy",
    "A sign no. 747 vs. St. Louis Ave. w/ stickers, etc.": "a sign no. 747 vs. st. louis ave. w / stickers etc.",
    "an e-mail to bob@x.com at www.example.com": "an e-mail to bob@x.com at www.example.com",
    "'tis O'Brien's cats 'n' dogs -- -5 and 5-10": "'t is o'brien 's cats 'n' dogs -5 and 5-10",
    "He is no. A cat": "he is no a cat",
    "J. Smith, e. e. cummings, T.V, plan A. The end A.": "j. smith e. e. cummings t.v plan a the end a.",
    "the end of the line.Next to the U.S.A. in Wash. D.C.": "the end of the line.next to the u.s.a. in wash. d.c.",
    "a sign with AT&T, R&B, q&a, C++ and C#": "a sign with at&t r&b q & a c++ and c#",
    "#tag @home's #1": "#tag @home 's # 1",
    "c'est l'eau, ma'am; y'all c'mon": "c'est l'eau ma'am y' all c'mon",
    "the '90s car is 6'2\" tall, lemme see": "the '90s car is 6 2 tall lem me see",
    "1½ cups, £5.50, €5, 5¢ at 100°F": "1 1/2 cups # 5.50 $ 5 5 cents at 100 ° f",
    "Jan. 5, Mon. morning, p. 5, fig. 5, Col. Mustard, Ph.D.": (
        "jan. 5 mon. morning p. 5 fig. 5 col. mustard ph.d."
    ),
    "the fig. he is in no mass. A miss. Miss. state": "the fig he is in no mass a miss miss. state",
    "a 0.5-inch dog.5 m… 1": "a 0.5-inch dog .5 m 1",
    "A dog (brown) that isn't on its leash -- he's chasing a frisbee.": (
        "a dog -lrb- brown -rrb- that is n't on its leash he 's chasing a frisbee"
    ),
}


@pytest.mark.parametrize("text", PRINTED_BY_COCO_CAPTION)
def test_words_are_those_of_coco_caption(text):
    assert caption_words(text) == PRINTED_BY_COCO_CAPTION[text].split()


@pytest.mark.parametrize("text", ["", " \n\t", "...", ". , ! ? ; : - --", "\"\" '' ``", "😀"])
def test_a_text_without_words(text):
    assert caption_words(text) == []


@pytest.mark.parametrize(
    "letter", ["a", "@", "-", ".", "a.", "a-", "a@", "a@a.", "'", "n't", "!", "<a", "１", "/"]
)
def test_an_answer_that_repeats_itself_takes_no_longer(letter):
    start = time.perf_counter()
    caption_words(letter * 4000)
    assert time.perf_counter() - start < 5


def test_the_tokenizer_has_a_name_for_results():
    assert "version" in CAPTION_TOKENIZER


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_characters="½¼¾⅓⅔¢"), max_size=40))  # written out as words
def test_words_have_no_whitespace_and_no_letter_is_lost(text):
    words = caption_words(text)
    assert all(word and not any(letter.isspace() for letter in word) for word in words)
    letters = [letter for letter in text.lower() if letter.isascii() and letter.isalnum()]
    kept = "".join(
        word for word in words if word not in ("-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-")
    )
    assert [letter for letter in kept if letter.isascii() and letter.isalnum()] == letters
