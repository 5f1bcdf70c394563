"""Short answers to questions: VQAv2's accuracy (also OK-VQA's and VizWiz's), and GQA's exact match."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean

from minigpt4.evaluation.metrics.matching import text_of, texts_of

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"\d,\d")
_ARTICLES = {"a", "an", "the"}
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def vqa_accuracy(answer: str, human_answers: Sequence[str]) -> float:
    """Return the accuracy, 0 to 1, of an answer to a question that several people (VQAv2: ten) answered.

    For each person min(1, number of the others who gave this answer / 3), averaged. Of ten people 0, 1, 2, 3, 4 or
    more who agree make 0, 0.3, 0.6, 0.9, 1; a single person makes 0.
    The rule is that of GT-Vision-Lab/VQA, `vqaEval.py`: the answer is normalised by `normalise_answer`, the human
    answers only by `normalise_punctuation`, and only if they are not all equal. So "two" never matches people who
    wrote "two", as it has become "2". (lmms-eval normalises both wholly; LAVIS and MiniGPT-4's scripts both sides,
    and neither if the people are unanimous.) Raises ValueError for no human answer and for what is not text.
    """
    said = normalise_answer(text_of(answer, "answer"))
    written = texts_of(human_answers, "human_answers")
    if len(set(written)) > 1:
        written = [normalise_punctuation(text) for text in written]
    agreeing = written.count(said)
    return fmean(min(1.0, (agreeing - (text == said)) / 3) for text in written)


def vqa_accuracy_minigpt4(answer: str, human_answers: Sequence[str]) -> float:
    """Return `vqa_accuracy` as MiniGPT-4's `eval_vqa.py` computes it for OK-VQA.

    The answer is lowered, and both sides are normalised by `normalise_answer`; neither is where the people are
    unanimous. Raises ValueError for no human answer and for what is not text.
    """
    said = _on_one_line(text_of(answer, "answer").lower().replace("<unk>", ""))
    written = [_on_one_line(text) for text in texts_of(human_answers, "human_answers")]
    if len(set(written)) > 1:
        said, written = normalise_answer(said), list(map(normalise_answer, written))
    agreeing = written.count(said)
    return fmean(min(1.0, (agreeing - (text == said)) / 3) for text in written)


def vizwiz_accuracy_minigpt4(answer: str, human_answers: Sequence[str]) -> float:
    """Return the share of three people who gave this answer, at most 1, as MiniGPT-4's `eval_vqa.py` does for VizWiz.

    Capitals do not count, all else does. Raises ValueError for no human answer and for what is not text.
    """
    said = text_of(answer, "answer").lower()
    return min(
        1.0, [text.lower() for text in texts_of(human_answers, "human_answers")].count(said) / 3
    )


def lowered_match(answer: str, label: str) -> float:
    """Return 1.0 if the answer in lower case is the label as it stands, as MiniGPT-4's `eval_vqa.py` for GQA and VSR.

    Raises ValueError for what is not text.
    """
    return float(text_of(answer, "answer").lower() == text_of(label, "label"))


def exact_match(answer: str, label: str) -> float:
    """Return 1.0 if the answer is the label, else 0.0; case, punctuation and surplus blanks do not count.

    This is the rule of lmms-eval's task gqa. GQA's own eval.py compares the raw texts, which no chat model's "Yes."
    would pass. Raises ValueError for what is not text.
    """
    said, right = text_of(answer, "answer"), text_of(label, "label")
    return float(_bare(said) == _bare(right))


def normalise_answer(text: str) -> str:
    """Return a model's answer as VQAv2 compares it.

    Line ends and tabs become blanks, `normalise_punctuation`, lower case, number words to ten become digits, articles
    are dropped, and apostrophes that are missing put in: "The two dogs, dont!" -> "2 dogs don't".
    """
    text = normalise_punctuation(_on_one_line(text))
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_contractions().get(word, word) for word in words if word not in _ARTICLES)


def normalise_punctuation(text: str) -> str:
    """Return `text` without VQAv2's punctuation.

    A mark that stands next to a blank somewhere in the text is removed everywhere, and so are all in a text with a
    comma between digits; any other becomes a blank: "1,000" -> "1000", "coca-cola" -> "coca cola". Periods go unless a
    digit follows.
    """
    original, removes_all = text, bool(_THOUSANDS.search(text))
    for mark in _PUNCTUATION:
        is_removed = removes_all or f"{mark} " in original or f" {mark}" in original
        text = text.replace(mark, "" if is_removed else " ")
    # the official code hands a flag, 32, to re.sub as the number of periods to remove
    return _PERIOD.sub("", text, count=32)


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _bare(text: str) -> str:
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


@cache
def _contractions() -> dict[str, str]:
    """Return the contraction that is meant by each way to write it, of contractions.json."""
    table = json.loads(Path(__file__).with_name("contractions.json").read_text(encoding="utf-8"))
    meant = {}
    for contraction, ways in table.items():
        meant |= dict.fromkeys(ways, contraction)
    return meant
