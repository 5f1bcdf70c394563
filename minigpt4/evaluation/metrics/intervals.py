"""Bootstrap confidence intervals over the items of a benchmark, with a fixed seed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from minigpt4.evaluation.metrics.matching import aligned, keyed

Values = Mapping[Hashable, float | Sequence[float]] | Sequence[float] | np.ndarray
Statistic = Callable[[np.ndarray], float]
Stratum = Callable[[Hashable], Hashable]


class Difference(NamedTuple):
    """How much higher one system is than another, the interval, and the two-sided p-value of no difference."""

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
    stratum: Stratum | None = None,
) -> tuple[float, float]:
    """Return the percentile interval (low, high) of `statistic` over the values, one row per item.

    The items are resampled `num_samples` times, with replacement. A score that is not a mean is a statistic of rows
    [N, K]: BLEU-4 is `bootstrap(bleu_counts(..), lambda rows: bleu_of(rows.sum(0))[3])`. With `stratum`, a function of an
    item's id, each stratum is resampled on its own and keeps its number of items. The same call returns the same
    interval; for a single item both ends are its value. Raises ValueError for no values and values that are not finite.
    """
    rows = _rows(values, "values")
    resampled = _resampled(rows, statistic, num_samples, seed, _strata(values, stratum))
    return _percentiles(resampled, confidence)


def paired_bootstrap(
    a: Values,
    b: Values,
    statistic: Statistic = np.mean,
    confidence: float = 0.95,
    num_samples: int = 1000,
    seed: int = 0,
    stratum: Stratum | None = None,
) -> Difference:
    """Return how much higher `statistic` is for `a` than for `b`, two systems on the same items.

    Each resample draws the same items for both, so that the difficulty of an item cancels out. The p-value is twice the
    fraction of resampled differences on the less frequent side of 0, but at least 1 / num_samples. Raises ValueError as
    `bootstrap`, and for ids that do not match.
    """
    if isinstance(a, Mapping):
        by_id = aligned(b, a, "a value of the other")
        b = [by_id[item] for item in a]
    rows_a, rows_b = _rows(a, "a"), _rows(b, "b")
    if len(rows_a) != len(rows_b):
        raise ValueError(f"{len(rows_a)} values against {len(rows_b)}; expected the same items")
    strata = _strata(a, stratum)
    resampled_a = _resampled(rows_a, statistic, num_samples, seed, strata)
    resampled_b = _resampled(rows_b, statistic, num_samples, seed, strata)
    differences = resampled_a - resampled_b
    tail = min(np.mean(differences <= 0), np.mean(differences >= 0))
    low, high = _percentiles(differences, confidence)
    p_value = float(np.clip(2 * tail, 1 / num_samples, 1))
    return Difference(float(statistic(rows_a) - statistic(rows_b)), low, high, p_value)


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


def _strata(values: Values, stratum: Stratum | None) -> list[np.ndarray]:
    """Return the positions of the rows of each stratum; without `stratum` there is one."""
    if stratum is None:
        return [np.arange(len(values))]
    positions: dict[Hashable, list[int]] = {}
    for position, item in enumerate(values if isinstance(values, Mapping) else range(len(values))):
        positions.setdefault(stratum(item), []).append(position)
    return list(map(np.array, positions.values()))


def _resampled(
    rows: np.ndarray, statistic: Statistic, num_samples: int, seed: int, strata: list[np.ndarray]
) -> np.ndarray:
    """Return the statistic of each resample [num_samples]; seed and sizes of the strata decide which rows are drawn."""
    if num_samples < 1:
        raise ValueError(f"num_samples: {num_samples}; expected at least 1")
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(num_samples):
        draws = [
            positions[rng.integers(len(positions), size=len(positions))] for positions in strata
        ]
        resampled.append(statistic(rows[np.concatenate(draws)]))
    return np.array(resampled, dtype=float)


def _percentiles(resampled: np.ndarray, confidence: float) -> tuple[float, float]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence}; expected a share between 0 and 1")
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)
