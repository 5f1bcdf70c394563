"""Yes-or-no questions: POPE and MME."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from minigpt4.evaluation.metrics.matching import keyed, matched, text_of

PERCEPTION = ["existence", "count", "position", "color", "posters"]
PERCEPTION += ["celebrity", "scene", "landmark", "artwork", "OCR"]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
SUBTASKS = [*PERCEPTION, *COGNITION]
MME_COUNTS = ["questions right", "questions", "images with both right", "images"]
POPE_COUNTS = ["true yes", "false yes", "true no", "false no", "unparsable"]


def pope(
    answers: Mapping[Hashable, str] | Sequence[str], labels: Mapping[Hashable, str] | Sequence[str]
) -> dict:
    """Return POPE's metrics on one of its splits; "yes" is the positive class. Labels are "yes" or "no".

    {"accuracy", "precision", "recall", "f1", "yes_ratio", "unparsable", "count"}. `yes_ratio` is the fraction of yes
    among the ANSWERS (lmms-eval prints that of the labels). `unparsable` counts the answers that say neither; they count
    as yes by the official rule (`pope_answer`), so a model that says nothing has accuracy 0.5. Precision, recall and F1
    are 0 where they are not defined. Raises ValueError for ids that do not match and for other labels.
    """
    return pope_of(sum(pope_counts(answers, labels).values()))


def pope_counts(
    answers: Mapping[Hashable, str] | Sequence[str], labels: Mapping[Hashable, str] | Sequence[str]
) -> dict[Hashable, np.ndarray]:
    """Return, by id, the POPE_COUNTS [5], each 0 or 1, that `pope_of` computes the metrics from, for one item or a sum."""
    texts, labels = matched(answers, labels, "labels")
    counts = {}
    for item, text in texts.items():
        answer = pope_answer(text)
        outcome = ("true " if answer == _label(labels[item], item) else "false ") + answer
        has_yes = re.search(r"\byes\b", text.partition(".")[0], re.IGNORECASE)
        says_neither = answer == "yes" and not has_yes
        flags = {outcome: 1, "unparsable": int(says_neither)}
        counts[item] = np.array([flags.get(name, 0) for name in POPE_COUNTS])
    return counts


def pope_of(counts: np.ndarray) -> dict:
    """Return the metrics of `pope` from counts [5], those of one item of `pope_counts` or a sum of them."""
    count = dict(zip(POPE_COUNTS, map(int, counts), strict=True))
    true_yes = count["true yes"]
    said_yes, is_yes = true_yes + count["false yes"], true_yes + count["false no"]
    total = said_yes + count["true no"] + count["false no"]
    return {
        "accuracy": (true_yes + count["true no"]) / total,
        "precision": true_yes / said_yes if said_yes else 0.0,
        "recall": true_yes / is_yes if is_yes else 0.0,
        "f1": 2 * true_yes / (said_yes + is_yes) if said_yes + is_yes else 0.0,
        "yes_ratio": said_yes / total,
        "unparsable": count["unparsable"],
        "count": total,
    }


def pope_answer(text: str) -> str:
    """Return "yes" or "no", as `evaluate.py` of AoiDragon/POPE parses an answer.

    It takes the text before the first period, without commas, split at spaces: "no" if one of the words is "No", "no"
    or "not", else "yes". So "No!" and "NO" are yes, as is an empty answer.
    """
    words = text.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


class MMEQuestion(NamedTuple):
    """One of the two questions that MME asks about an image. The label is "Yes" or "No"."""

    subtask: str
    image: str
    label: str


def mme(
    answers: Mapping[Hashable, str] | Sequence[str], questions: Mapping[Hashable, MMEQuestion]
) -> dict:
    """Return MME's scores; `questions` are (subtask, image, label) by id.

    {"perception": up to 2000, "cognition": up to 800, "subtasks": {name: {"score", "accuracy", "accuracy_plus"}},
    "unparsable"}. A subtask's score is 100 * (fraction of questions right + fraction of images with both questions
    right); `perception` and `cognition` are the sums over their subtasks, as far as there are questions. An answer that
    `mme_answer` reads as "other" is wrong. Raises ValueError for ids that do not match, an image without exactly two
    questions, an unknown subtask and other labels.
    """
    counts = mme_counts(answers, questions)
    for (subtask, image), count in counts.items():
        num_asked = count.reshape(-1, len(MME_COUNTS)).sum(axis=0)[1]
        if num_asked != 2:
            raise ValueError(
                f"{subtask}: image {image!r} has {num_asked} questions; MME asks two about each"
            )
    unparsable = sum(mme_answer(text) == "other" for text in keyed(answers, "answers").values())
    return mme_of(sum(counts.values())) | {"unparsable": unparsable}


def mme_counts(
    answers: Mapping[Hashable, str] | Sequence[str], questions: Mapping[Hashable, MMEQuestion]
) -> dict[tuple[str, str], np.ndarray]:
    """Return, by (subtask, image), what `mme_of` computes the scores from: MME_COUNTS of all subtasks, concatenated.

    Raises ValueError as `mme`, but not for an image without exactly two questions: one may have no answer.
    """
    texts, questions = matched(answers, questions, "questions")
    right: dict[tuple[str, str], list[bool]] = {}
    for item, question in questions.items():
        question = _mme_question(question, item)
        is_right = mme_answer(texts[item]) == question.label
        right.setdefault((question.subtask, question.image), []).append(is_right)
    counts = {}
    for (subtask, image), of_image in right.items():
        table = np.zeros((len(SUBTASKS), len(MME_COUNTS)), dtype=int)
        table[SUBTASKS.index(subtask)] = sum(of_image), len(of_image), sum(of_image) == 2, 1
        counts[subtask, image] = table.ravel()
    return counts


def mme_of(counts: np.ndarray) -> dict:
    """Return the scores of `mme`, without "unparsable", from the counts of one image of `mme_counts` or a sum of them."""
    subtasks = {}
    for name, of_subtask in zip(SUBTASKS, counts.reshape(-1, len(MME_COUNTS)), strict=True):
        count = dict(zip(MME_COUNTS, map(int, of_subtask), strict=True))
        if count["images"]:
            accuracy = count["questions right"] / count["questions"]
            accuracy_plus = count["images with both right"] / count["images"]
            score = 100 * (accuracy + accuracy_plus)
            subtasks[name] = {"score": score, "accuracy": accuracy, "accuracy_plus": accuracy_plus}
    return {
        "perception": sum(subtasks[name]["score"] for name in PERCEPTION if name in subtasks),
        "cognition": sum(subtasks[name]["score"] for name in COGNITION if name in subtasks),
        "subtasks": subtasks,
    }


def mme_answer(text: str) -> str:
    """Return "yes", "no" or "other", as lmms-eval's `tasks/mme/utils.py` parses an answer.

    The text is lower-cased and stripped, and periods are removed. It is yes or no if it is "y" or "n", or if "yes" or
    "no" occurs in its first four characters. MME's own tool does the same without removing periods and whitespace.
    """
    text = text.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return {"y": "yes", "n": "no"}[text]
    for answer in ("yes", "no"):
        if answer in text[:4]:
            return answer
    return "other"


def _mme_question(values: Sequence[str], item: Hashable) -> MMEQuestion:
    """Return a question with its label in lower case. Raises ValueError for another form, subtask or label."""
    if not isinstance(values, (tuple, list)) or len(values) != 3:
        raise ValueError(f"question of {item!r}: expected (subtask, image, label)")
    question = MMEQuestion(*values)
    if question.subtask not in SUBTASKS:
        known = ", ".join(SUBTASKS)
        raise ValueError(
            f"question of {item!r}: unknown subtask {question.subtask!r}; MME has {known}"
        )
    return question._replace(label=_label(question.label, item))


def _label(label: str, item: Hashable) -> str:
    """Return a label in lower case. Raises ValueError unless it is yes or no."""
    text = text_of(label, f"label of {item!r}").strip().lower()
    if text not in ("yes", "no"):
        raise ValueError(f"label of {item!r}: found {label!r}; expected yes or no")
    return text
