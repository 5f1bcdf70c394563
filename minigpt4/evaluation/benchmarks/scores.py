"""The figures of a benchmark, in a form of which intervals and differences can be made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from minigpt4.evaluation.benchmarks.benchmark import BenchmarkItem


class Metric(NamedTuple):
    """A figure and what it is made of: `of` makes it of the rows, an array [N] or [N, K].

    `rows` are by item, or by whatever is drawn anew for an interval (MME: by image).
    """

    rows: Mapping[str, float | Sequence[float]]
    of: Callable[[np.ndarray], float] = np.mean

    def value(self) -> float:
        """Return the figure."""
        return float(self.of(np.array(list(self.rows.values()), dtype=float)))


class Scores(NamedTuple):
    """`per_item`: how good each answer is, for the page: 0 is wrong. `unparsable`: answers that say nothing."""

    metrics: dict[str, Metric]
    per_item: dict[str, float]
    unparsable: int


def with_groups(metrics: Mapping[str, Metric], items: Sequence[BenchmarkItem]) -> dict[str, Metric]:
    """Return the metrics over all items, then those of each named group as "group/metric", if there are several."""
    groups: dict[str, list[str]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item.id)
    found = dict(metrics)
    for group, ids in groups.items() if len(groups) > 1 else ():
        for name, metric in metrics.items() if group else ():
            found[f"{group}/{name}"] = Metric({item: metric.rows[item] for item in ids}, metric.of)
    return found


def figure(
    of: Callable[[np.ndarray], Mapping[str, float]], name: str
) -> Callable[[np.ndarray], float]:
    """Return what makes the figure `name` of rows [N, K], where `of` makes all figures of their sum."""
    return lambda rows: of(rows.sum(axis=0))[name]


def num_empty(answers: Mapping[str, str]) -> int:
    """Return how many answers have no word at all."""
    return sum(not answer.strip() for answer in answers.values())
