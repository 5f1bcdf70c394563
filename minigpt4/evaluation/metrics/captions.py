"""Captions against references: CIDEr-D, BLEU-1 to 4 and ROUGE-L, with the numbers of COCO's caption evaluation.

Rules: pycocoevalcap 1.2 (`cider/cider_scorer.py`, `bleu/bleu_scorer.py`, `rouge/rouge.py`), which is coco-caption.
References are id -> list of texts, answers id -> text, or two lists in the same order. Texts are split at blanks unless
`tokenize` is given; COCO's figures need `tokenizer.caption_words`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np

from minigpt4.evaluation.metrics.matching import Ids, Tokenize, matched, texts_of

MAX_N = 4  # n-grams of one to four words
SIGMA = 6.0  # CIDEr-D: words of difference in length that are forgiven
BETA = 1.2  # ROUGE-L: how much recall counts more than precision
TINY, SMALL = 1e-15, 1e-9  # BLEU: keep it positive and defined where nothing matches

Words = list[str]
References = Mapping[Hashable, Sequence[str]] | Sequence[Sequence[str]]
Answers = Mapping[Hashable, str] | Sequence[str]


def cider_d(
    references: References, answers: Answers, tokenize: Tokenize | None = None
) -> tuple[float, dict[Hashable, float]]:
    """Return CIDEr-D of all answers (their mean, 0 to 10) and of each, by id.

    An n-gram weighs its count times ln(N / number of the N items with it in a reference). A reference scores
    sum(min(answer, reference) * reference) / (norms), times exp(-difference in length^2 / 72); averaged over n = 1..4
    and the references, times 10. It depends on all N items: with one item every weight, and the score, is 0.
    Raises ValueError for ids that do not match, an item without a reference, and what is not text.
    """
    spoken, written = _words(references, answers, tokenize)
    counted, items_with = {}, Counter()
    for item, texts in written.items():
        counted[item] = [_ngrams(words) for words in texts]
        items_with.update(set().union(*counted[item]))
    idf = {ngram: math.log(len(spoken)) - math.log(count) for ngram, count in items_with.items()}
    unknown = math.log(len(spoken))  # of an n-gram in no reference

    scores = {}
    for item, words in spoken.items():
        answer = _vector(_ngrams(words), idf, unknown)
        vectors = [_vector(ngrams, idf, unknown) for ngrams in counted[item]]
        scores[item] = 10 * fmean(_cider_similarity(answer, vector) for vector in vectors)
    return fmean(scores.values()), scores


def bleu(references: References, answers: Answers, tokenize: Tokenize | None = None) -> list[float]:
    """Return BLEU-1 to BLEU-4 of all answers together (0 to 1), against the references closest in length.

    The n-grams of all items are summed before they are divided, so it is no mean over items: `bleu_counts` has what
    an interval needs. Raises ValueError as `cider_d`.
    """
    return bleu_of(sum(bleu_counts(references, answers, tokenize).values()))


def bleu_counts(
    references: References, answers: Answers, tokenize: Tokenize | None = None
) -> dict[Hashable, np.ndarray]:
    """Return by id the ten counts that BLEU is made of: `bleu_of` gives BLEU of one item, or of a sum of items.

    They are the length of the answer and of the reference closest to it (of two, the shorter), the n-grams of the
    answer that a reference has, as often as it has them, for n = 1..4, and all n-grams of the answer for n = 1..4.
    """
    spoken, written = _words(references, answers, tokenize)
    counts = {}
    for item, words in spoken.items():
        most: Counter = Counter()
        for text in written[item]:
            most |= _ngrams(text)
        found = Counter(len(ngram) for ngram in (_ngrams(words) & most).elements())
        length = len(words)
        closest = min((abs(len(text) - length), len(text)) for text in written[item])[1]
        right = [found[n] for n in range(1, MAX_N + 1)]
        said = [max(0, length - n + 1) for n in range(1, MAX_N + 1)]
        counts[item] = np.array([length, closest, *right, *said])
    return counts


def bleu_of(counts: np.ndarray) -> list[float]:
    """Return BLEU-1 to BLEU-4 of counts [10], those of one item of `bleu_counts` or a sum of them.

    TINY and SMALL are pycocoevalcap's: without a match BLEU is not 0 but about 1e-5.
    """
    brevity = min(1.0, math.exp(1 - (counts[1] + SMALL) / (counts[0] + TINY)))
    right, said = counts[2 : 2 + MAX_N], counts[2 + MAX_N :]
    products = np.cumprod((right + TINY) / (said + SMALL))
    return [float(product ** (1 / n)) * brevity for n, product in enumerate(products, start=1)]


def rouge_l(
    references: References, answers: Answers, tokenize: Tokenize | None = None
) -> tuple[float, dict[Hashable, float]]:
    """Return ROUGE-L of all answers (their mean, 0 to 1) and of each, by id.

    Precision and recall of the longest common subsequence of words, each the best over the references, joined as
    F with beta 1.2. An empty answer scores 0. Raises ValueError as `cider_d`.
    """
    spoken, written = _words(references, answers, tokenize)
    scores = {item: _rouge_l(words, written[item]) for item, words in spoken.items()}
    return fmean(scores.values()), scores


class _Vector(NamedTuple):
    """The weights of a text's n-grams and their norm, for each n, and its length in words."""

    weights: list[dict]
    norms: list[float]
    length: int


def _words(
    references: References, answers: Answers, tokenize: Tokenize | None
) -> tuple[dict, dict]:
    """Return the words of each answer and of each reference, by id."""
    tokenize = tokenize or str.split
    spoken, written = matched(answers, references, "references")
    words: dict[Hashable, list[Words]] = {}
    for item, texts in written.items():
        words[item] = [list(tokenize(text)) for text in texts_of(texts, f"references of {item!r}")]
    return {item: list(tokenize(text)) for item, text in spoken.items()}, words


def _ngrams(words: Words) -> Counter:
    counts: Counter = Counter()
    for n in range(1, MAX_N + 1):
        counts.update(zip(*(words[start:] for start in range(n)), strict=False))
    return counts


def _vector(ngrams: Counter, idf: Ids, unknown: float) -> _Vector:
    weights: list[dict] = [{} for _ in range(MAX_N)]
    for ngram, count in ngrams.items():
        weights[len(ngram) - 1][ngram] = count * idf.get(ngram, unknown)
    norms = [math.hypot(*each.values()) for each in weights]
    length = sum(count for ngram, count in ngrams.items() if len(ngram) == 1)
    return _Vector(weights, norms, length)


def _cider_similarity(answer: _Vector, reference: _Vector) -> float:
    cosines = []
    for n in range(MAX_N):
        said, written = answer.weights[n], reference.weights[n]
        common = math.fsum(
            min(said[ngram], written[ngram]) * written[ngram] for ngram in said if ngram in written
        )
        norms = answer.norms[n] * reference.norms[n]
        cosines.append(common / norms if norms else 0.0)
    difference = answer.length - reference.length
    return fmean(cosines) * math.exp(-(difference**2) / (2 * SIGMA**2))


def _rouge_l(words: Words, references: list[Words]) -> float:
    common = [_common_subsequence(words, reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(words)
    recall = max(
        length / len(text) for length, text in zip(common, references, strict=True) if text
    )
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common_subsequence(a: Words, b: Words) -> int:
    """Return the number of words of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        above = row
        row = [0]
        for column, other in enumerate(b, start=1):
            row.append(above[column - 1] + 1 if word == other else max(above[column], row[-1]))
    return row[-1]
