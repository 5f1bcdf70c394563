"""Captions against references: CIDEr-D, BLEU-1 to 4 and ROUGE-L, with COCO's results for the same words.

Rules: pycocoevalcap 1.2 (`cider/cider_scorer.py`, `bleu/bleu_scorer.py`, `rouge/rouge.py`), which is coco-caption.
References are id -> list of texts, answers id -> text, or two lists in the same order. Texts are split at whitespace
unless `tokenize` is given; `tokenizer.caption_words` gives COCO's words, but for a few rare ones.
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
SIGMA = 6.0  # CIDEr-D: standard deviation, in words, of the Gaussian penalty on the difference in length
BETA = 1.2  # ROUGE-L: weight of recall relative to precision
TINY, SMALL = 1e-15, 1e-9  # BLEU: keep it positive and defined if nothing matches

Words = list[str]
References = Mapping[Hashable, Sequence[str]] | Sequence[Sequence[str]]
Answers = Mapping[Hashable, str] | Sequence[str]


def cider_d(
    references: References, answers: Answers, tokenize: Tokenize | None = None
) -> tuple[float, dict[Hashable, float]]:
    """Return CIDEr-D of all answers (their mean, 0 to 10) and of each answer, by id.

    An n-gram's weight is its count times ln(N / number of the N items that have it in a reference). The similarity to a
    reference is sum(min(answer, reference) * reference) / (product of the norms), times
    exp(-(difference in length)^2 / 72); it is averaged over n = 1..4 and the references, times 10. It depends on all N
    items: with a single item every weight, and so the score, is 0.
    Raises ValueError for ids that do not match, an item without a reference, and anything that is not text.
    """
    answer_words, reference_words = _words(references, answers, tokenize)
    # document frequency: in how many items' references an n-gram occurs
    reference_ngrams, items_with = {}, Counter()
    for item, texts in reference_words.items():
        reference_ngrams[item] = [_ngrams(words) for words in texts]
        items_with.update(set().union(*reference_ngrams[item]))
    log_items = math.log(len(answer_words))
    idf = {ngram: log_items - math.log(count) for ngram, count in items_with.items()}
    unknown = log_items  # idf of an n-gram in no reference

    scores = {}
    for item, words in answer_words.items():
        answer = _vector(_ngrams(words), idf, unknown)
        vectors = [_vector(ngrams, idf, unknown) for ngrams in reference_ngrams[item]]
        scores[item] = 10 * fmean(_cider_similarity(answer, vector) for vector in vectors)
    return fmean(scores.values()), scores


def bleu(references: References, answers: Answers, tokenize: Tokenize | None = None) -> list[float]:
    """Return BLEU-1 to BLEU-4 of all answers together (0 to 1).

    The brevity penalty takes the reference closest in length. The n-gram counts of all items are summed before they are
    divided, so BLEU is not a mean over items; `bleu_counts` returns what an interval needs. Raises ValueError as
    `cider_d`.
    """
    return bleu_of(sum(bleu_counts(references, answers, tokenize).values()))


def bleu_counts(
    references: References, answers: Answers, tokenize: Tokenize | None = None
) -> dict[Hashable, np.ndarray]:
    """Return, by id, the ten counts that BLEU is computed from; `bleu_of` computes it from one item or a sum of items.

    They are the length of the answer and of the reference closest in length (of two, the shorter), the n-grams of the
    answer that match, each at most as often as a single reference has it, for n = 1..4, and all n-grams of the answer
    for n = 1..4.
    """
    answer_words, reference_words = _words(references, answers, tokenize)
    counts = {}
    for item, words in answer_words.items():
        # for each n-gram, the most often that one reference has it
        clip: Counter = Counter()
        for text in reference_words[item]:
            clip |= _ngrams(text)
        num_matches = Counter(len(ngram) for ngram in (_ngrams(words) & clip).elements())
        length = len(words)
        closest = min((abs(len(text) - length), len(text)) for text in reference_words[item])[1]
        matches = [num_matches[n] for n in range(1, MAX_N + 1)]
        totals = [max(0, length - n + 1) for n in range(1, MAX_N + 1)]
        counts[item] = np.array([length, closest, *matches, *totals])
    return counts


def bleu_of(counts: np.ndarray) -> list[float]:
    """Return BLEU-1 to BLEU-4 from counts [10], those of one item of `bleu_counts` or a sum of them.

    TINY and SMALL are pycocoevalcap's: without a match BLEU is not 0 but about 1e-5.
    """
    brevity = min(1.0, math.exp(1 - (counts[1] + SMALL) / (counts[0] + TINY)))
    matches, totals = counts[2 : 2 + MAX_N], counts[2 + MAX_N :]
    products = np.cumprod((matches + TINY) / (totals + SMALL))
    return [float(product ** (1 / n)) * brevity for n, product in enumerate(products, start=1)]


def rouge_l(
    references: References, answers: Answers, tokenize: Tokenize | None = None
) -> tuple[float, dict[Hashable, float]]:
    """Return ROUGE-L of all answers (their mean, 0 to 1) and of each answer, by id.

    The F-measure, with beta 1.2, of precision and recall of the longest common subsequence of words, each the best over
    the references. An empty answer scores 0. Raises ValueError as `cider_d`.
    """
    answer_words, reference_words = _words(references, answers, tokenize)
    scores = {item: _rouge_l(words, reference_words[item]) for item, words in answer_words.items()}
    return fmean(scores.values()), scores


class _Vector(NamedTuple):
    """The TF-IDF weights of a text's n-grams and their norm, for each n, and the text's length in words."""

    weights: list[dict]
    norms: list[float]
    length: int


def _words(
    references: References, answers: Answers, tokenize: Tokenize | None
) -> tuple[dict, dict]:
    """Return the words of each answer and of each reference, by id."""
    tokenize = tokenize or str.split
    answers, references = matched(answers, references, "references")
    answer_words = {item: list(tokenize(text)) for item, text in answers.items()}
    reference_words: dict[Hashable, list[Words]] = {}
    for item, texts in references.items():
        texts = texts_of(texts, f"references of {item!r}")
        reference_words[item] = [list(tokenize(text)) for text in texts]
    return answer_words, reference_words


def _ngrams(words: Words) -> Counter:
    """Return how often each n-gram, a tuple of 1 to MAX_N words, occurs."""
    counts: Counter = Counter()
    for n in range(1, MAX_N + 1):
        counts.update(zip(*(words[start:] for start in range(n)), strict=False))
    return counts


def _vector(ngrams: Counter, idf: Ids, unknown: float) -> _Vector:
    """Return the vector of a text; `unknown` is the idf of an n-gram in no reference."""
    weights: list[dict] = [{} for _ in range(MAX_N)]
    for ngram, count in ngrams.items():
        weights[len(ngram) - 1][ngram] = count * idf.get(ngram, unknown)
    norms = [math.hypot(*each.values()) for each in weights]
    length = sum(count for ngram, count in ngrams.items() if len(ngram) == 1)
    return _Vector(weights, norms, length)


def _cider_similarity(answer: _Vector, reference: _Vector) -> float:
    """Return the similarity, 0 to 1, of an answer to one reference; see `cider_d`."""
    cosines = []
    for n in range(MAX_N):
        ours, theirs = answer.weights[n], reference.weights[n]
        common = math.fsum(
            min(ours[ngram], theirs[ngram]) * theirs[ngram] for ngram in ours if ngram in theirs
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
