"""Short answers to questions: VQAv2's accuracy (also for OK-VQA and VizWiz) and exact match for GQA."""

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
    """Return the accuracy, 0 to 1, of an answer to a question that several annotators (VQAv2: ten) answered.

    For each annotator min(1, number of the others who gave this answer / 3), averaged. If 0, 1, 2, 3, 4 or more of ten
    annotators agree, it is 0, 0.3, 0.6, 0.9, 1; with a single annotator it is 0.
    The rule is that of GT-Vision-Lab/VQA, `vqaEval.py`: the answer is normalised by `normalise_answer`, the human
    answers only by `normalise_punctuation`, and only if they are not all equal. So "two" never matches annotators who
    wrote "two", as it has become "2". (lmms-eval fully normalises both sides; so do LAVIS and MiniGPT-4's scripts, but
    neither side if the annotators are unanimous.) Raises ValueError for no human answer and anything that is not text.
    """
    answer = normalise_answer(text_of(answer, "answer"))
    references = texts_of(human_answers, "human_answers")
    if len(set(references)) > 1:
        references = [normalise_punctuation(text) for text in references]
    return _agreement(answer, references)


def vqa_accuracy_minigpt4(answer: str, human_answers: Sequence[str]) -> float:
    """Return `vqa_accuracy` as MiniGPT-4's `eval_vqa.py` computes it for OK-VQA.

    The answer is lower-cased. Both sides are normalised by `normalise_answer`, but neither if the annotators are
    unanimous. Raises ValueError for no human answer and anything that is not text.
    """
    answer = _on_one_line(text_of(answer, "answer").lower().replace("<unk>", ""))
    references = [_on_one_line(text) for text in texts_of(human_answers, "human_answers")]
    if len(set(references)) > 1:
        answer, references = normalise_answer(answer), list(map(normalise_answer, references))
    return _agreement(answer, references)


def _agreement(answer: str, references: list[str]) -> float:
    """Return the mean over the annotators of min(1, number of the others who gave this answer / 3)."""
    num_equal = references.count(answer)
    return fmean(min(1.0, (num_equal - (text == answer)) / 3) for text in references)


def vizwiz_accuracy_minigpt4(answer: str, human_answers: Sequence[str]) -> float:
    """Return min(1, number of annotators who gave this answer / 3), as MiniGPT-4's `eval_vqa.py` does for VizWiz.

    Only case is ignored. Raises ValueError for no human answer and anything that is not text.
    """
    answer = text_of(answer, "answer").lower()
    references = [text.lower() for text in texts_of(human_answers, "human_answers")]
    return min(1.0, references.count(answer) / 3)


def lowered_match(answer: str, label: str) -> float:
    """Return 1.0 if the lower-cased answer equals the label, else 0.0, as MiniGPT-4's `eval_vqa.py` for GQA and VSR.

    The label is not lower-cased. Raises ValueError for anything that is not text.
    """
    return float(text_of(answer, "answer").lower() == text_of(label, "label"))


def exact_match(answer: str, label: str) -> float:
    """Return 1.0 if the answer equals the label, else 0.0; case, punctuation and extra whitespace are ignored.

    Punctuation counts if the label is nothing else, such as "?".
    This is the rule of lmms-eval's task gqa. GQA's own eval.py compares the raw texts, so that a chat model's "Yes."
    would be wrong. Raises ValueError for anything that is not text.
    """
    answer, label = text_of(answer, "answer"), text_of(label, "label")
    if not _bare(label):
        return float(answer.strip() == label.strip())
    return float(_bare(answer) == _bare(label))


def normalise_answer(text: str) -> str:
    """Return a model's answer in the form in which VQAv2 compares it.

    Line breaks and tabs become spaces, punctuation goes (`normalise_punctuation`), the text is lower-cased, number words
    up to ten become digits, articles are dropped, and missing apostrophes are inserted: "The two dogs, dont!" ->
    "2 dogs don't".
    """
    text = normalise_punctuation(_on_one_line(text))
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_contractions().get(word, word) for word in words if word not in _ARTICLES)


def normalise_punctuation(text: str) -> str:
    """Return `text` without VQAv2's punctuation.

    A mark that is next to a space anywhere in the text is removed everywhere, and so are all marks of a text with a
    comma between digits; any other mark becomes a space: "1,000" -> "1000", "coca-cola" -> "coca cola". Periods are
    removed unless a digit follows.
    """
    original, removes_all = text, bool(_THOUSANDS.search(text))
    for mark in _PUNCTUATION:
        is_removed = removes_all or f"{mark} " in original or f" {mark}" in original
        text = text.replace(mark, "" if is_removed else " ")
    # The official code passes a flag, whose value is 32, as the `count` of re.sub, so only 32 periods are removed.
    return _PERIOD.sub("", text, count=32)


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _bare(text: str) -> str:
    """Return the text in lower case, without punctuation and extra whitespace."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


@cache
def _contractions() -> dict[str, str]:
    """Return the correct contraction for each spelling in contractions.json."""
    table = json.loads(Path(__file__).with_name("contractions.json").read_text(encoding="utf-8"))
    corrected = {}
    for contraction, spellings in table.items():
        corrected |= dict.fromkeys(spellings, contraction)
    return corrected
