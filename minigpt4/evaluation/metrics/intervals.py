"""How far a score may be chance: bootstrap intervals over the items of a benchmark, with a fixed seed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from minigpt4.evaluation.metrics.matching import aligned, keyed

Values = Mapping[Hashable, float | Sequence[float]] | Sequence[float] | np.ndarray
Statistic = Callable[[np.ndarray], float]


class Difference(NamedTuple):
    """`value` of one system above another, its interval, and the two-sided p-value of no difference."""

    value: float
    low: float
    high: float
    p_value: float


def bootstrap(
    values: Values,
    statistic: Statistic = np.mean,
    confidence: float = 0.95,
    num_samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval (low, high) of `statistic` of the values, one row of them for each item.

    The items are drawn again `num_samples` times, with replacement. A score that is no mean is given as a statistic of
    rows [N, K]: BLEU-4 is `bootstrap(bleu_counts(..), lambda rows: bleu_of(rows.sum(0))[3])`. The same call returns the
    same interval; of one item it is that item's value. Raises ValueError for no value and for what is not finite.
    """
    return _percentiles(
        _resampled(_rows(values, "values"), statistic, num_samples, seed), confidence
    )


def paired_bootstrap(
    a: Values,
    b: Values,
    statistic: Statistic = np.mean,
    confidence: float = 0.95,
    num_samples: int = 1000,
    seed: int = 0,
) -> Difference:
    """Return how much higher `statistic` is for `a` than for `b`, two systems on the same items.

    Each time the same items are drawn for both, so what makes an item hard cancels out. The p-value is twice the share
    of draws on the side of 0 that the difference is not on, at least 1 / num_samples. Raises ValueError as
    `bootstrap`, and for ids that do not match.
    """
    if isinstance(a, Mapping):
        b = [aligned(b, a, "a value of the other")[item] for item in a]
    first, second = _rows(a, "a"), _rows(b, "b")
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values against {len(second)}; expected the same items")
    drawn = _resampled(first, statistic, num_samples, seed) - _resampled(
        second, statistic, num_samples, seed
    )
    tail = min(np.mean(drawn <= 0), np.mean(drawn >= 0))
    low, high = _percentiles(drawn, confidence)
    p_value = float(np.clip(2 * tail, 1 / num_samples, 1))
    return Difference(float(statistic(first) - statistic(second)), low, high, p_value)


def _rows(values: Values, name: str) -> np.ndarray:
    """Return the values as an array [N] or [N, K]."""
    listed = list(values) if isinstance(values, np.ndarray) else list(keyed(values, name).values())
    try:
        rows = np.asarray(listed, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected numbers, as many for each item ({error})") from error
    if not rows.size or not np.isfinite(rows).all():
        raise ValueError(f"{name}: expected finite numbers, at least one")
    return rows


def _resampled(rows: np.ndarray, statistic: Statistic, num_samples: int, seed: int) -> np.ndarray:
    """Return the statistic of each draw [num_samples]; the same seed and number of rows draw the same items."""
    if num_samples < 1:
        raise ValueError(f"num_samples: {num_samples}; expected at least 1")
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(rows), size=len(rows)) for _ in range(num_samples))
    return np.array([statistic(rows[draw]) for draw in draws], dtype=float)


def _percentiles(drawn: np.ndarray, confidence: float) -> tuple[float, float]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence}; expected a share between 0 and 1")
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)
