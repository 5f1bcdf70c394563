"""The metrics of a benchmark, in a form that allows bootstrap intervals and paired differences."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minigpt4.evaluation.metrics import exact_match, lowered_match

if TYPE_CHECKING:
    from minigpt4.evaluation.benchmarks.benchmark import BenchmarkItem


class Metric(NamedTuple):
    """A metric: `of` computes its value from the rows, an array [N] or [N, K].

    There is one row per item, or per unit that the bootstrap resamples (MME: per image), by id. `stratum` is a function
    of an id; the bootstrap then resamples each stratum on its own.
    """

    rows: Mapping[Hashable, float | Sequence[float]]
    of: Callable[[np.ndarray], float] = np.mean
    stratum: Callable[[Hashable], Hashable] | None = None

    def value(self) -> float:
        """Return the metric over all rows."""
        return float(self.of(np.array(list(self.rows.values()), dtype=float)))


class Scores(NamedTuple):
    """The scores of a benchmark's answers."""

    metrics: dict[str, Metric]
    per_item: dict[
        str, float
    ]  # by id, how good an answer is; 0 is wrong. It orders the answers on the pages.
    unparsable: int  # number of answers without anything that can be scored


def with_groups(metrics: Mapping[str, Metric], items: Sequence[BenchmarkItem]) -> dict[str, Metric]:
    """Return the metrics over all items and, if there are several groups, of each named one as "group/metric"."""
    groups: dict[str, list[str]] = {}
    for item in items:
        groups.setdefault(item.group, []).append(item.id)
    found = dict(metrics)
    if len(groups) < 2:
        return found
    for group, ids in groups.items():
        if group:
            for name, metric in metrics.items():
                rows = {item_id: metric.rows[item_id] for item_id in ids}
                found[f"{group}/{name}"] = metric._replace(rows=rows)
    return found


def label_scores(
    items: Sequence[BenchmarkItem], answers: Mapping[str, str], unparsable: int
) -> Scores:
    """Return the accuracy, over all items and by group, of answers whose reference is one label.

    Once by `exact_match`, and once by the rule of the release's eval_vqa.py, `lowered_match`.
    """
    right = {item.id: exact_match(answers[item.id], item.reference) for item in items}
    by_release = {item.id: lowered_match(answers[item.id], item.reference) for item in items}
    figures = {"accuracy": Metric(right), "accuracy_minigpt4": Metric(by_release)}
    return Scores(with_groups(figures, items), right, unparsable)


def figure(
    of: Callable[[np.ndarray], Mapping[str, float]], name: str
) -> Callable[[np.ndarray], float]:
    """Return the function that computes the metric `name` from count rows [N, K].

    `of` computes all metrics from the sum of the rows, see `X_of` in `metrics`.
    """
    return lambda rows: of(rows.sum(axis=0))[name]


def num_empty(answers: Mapping[str, str]) -> int:
    """Return how many answers are empty or only whitespace."""
    return sum(not answer.strip() for answer in answers.values())
