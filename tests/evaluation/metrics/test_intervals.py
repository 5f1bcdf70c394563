"""Bootstrap intervals: known cases, reproducible, and close to the theory."""

from operator import itemgetter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4.evaluation.metrics import (
    bleu,
    bleu_counts,
    bleu_of,
    bootstrap,
    paired_bootstrap,
    pope_counts,
    pope_of,
)


def test_one_item_and_equal_items_have_no_width():
    assert bootstrap([0.3]) == (0.3, 0.3)
    assert bootstrap({"a": 1, "b": 1}) == (1, 1)


def test_a_call_is_reproducible_and_depends_on_the_seed():
    values = np.arange(50) % 7
    assert bootstrap(values) == bootstrap(list(map(int, values)))
    assert bootstrap(values) != bootstrap(values, seed=1)
    assert paired_bootstrap(values, values[::-1]) == paired_bootstrap(values, values[::-1])


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_intervals_of_a_mean_are_close_to_the_normal_distributions(confidence):
    values = np.random.default_rng(5).normal(3, 2, size=2000)
    margin = {0.8: 1.2816, 0.95: 1.96}[confidence] * values.std() / np.sqrt(2000)
    low, high = bootstrap(values, confidence=confidence, num_samples=4000)
    assert (low, high) == pytest.approx(
        (values.mean() - margin, values.mean() + margin), abs=0.15 * margin
    )


def test_a_score_that_is_not_a_mean():
    references = [["a b c d e"], ["v w x y z"], ["a b c d f"]]
    answers = ["a b c d x", "v w x y z", "a q c d f"]
    low, high = bootstrap(bleu_counts(references, answers), lambda rows: bleu_of(rows.sum(0))[3])
    assert 0 <= low < bleu(references, answers)[3] < high <= 1
    counts = pope_counts(["Yes", "No", "No"] * 20, ["yes", "no", "yes"] * 20)
    low, high = bootstrap(counts, lambda rows: pope_of(rows.sum(0))["f1"])
    assert low < 2 / 3 < high


def test_the_same_items_are_drawn_for_both_systems():
    # b is a little worse everywhere: each alone varies widely, but their difference does not
    a = np.random.default_rng(0).normal(size=100)
    result = paired_bootstrap(a, a - 0.01)
    assert (result.value, result.low, result.high) == pytest.approx((0.01, 0.01, 0.01))
    assert result.p_value == 0.001  # no draw on the other side: at most one in num_samples
    assert paired_bootstrap(a - 0.01, a).value == pytest.approx(-0.01)
    assert bootstrap(a)[1] - bootstrap(a)[0] > 0.3


def test_each_stratum_keeps_its_number_of_items():
    values = {("a", 1): 0.0, ("a", 2): 0.0, ("b", 1): 1.0}
    assert bootstrap(values) == (0, 1)
    assert bootstrap(values, stratum=itemgetter(0)) == pytest.approx((1 / 3, 1 / 3))
    worse = dict.fromkeys(values, 0.0)
    difference = paired_bootstrap(values, worse, stratum=itemgetter(0))
    assert (difference.low, difference.high) == pytest.approx((1 / 3, 1 / 3))
    assert bootstrap([0, 0, 1], stratum=lambda place: place) == pytest.approx((1 / 3, 1 / 3))


def test_no_difference():
    a = [0, 1] * 30
    assert paired_bootstrap(a, a) == (0, 0, 0, 1)
    result = paired_bootstrap(a, a[::-1])
    assert result.value == 0 and result.low < 0 < result.high and result.p_value > 0.5


def test_the_p_value_is_two_sided():
    # With three items of differences 1, 1, -1 a resample is not above 0 if it has the last item twice or more: 7 of 27.
    assert paired_bootstrap([1, 1, 0], [0, 0, 1], num_samples=5000).p_value == pytest.approx(
        2 * 7 / 27, abs=0.03
    )


def test_items_are_paired_by_id_not_by_order():
    a = {"x": 1.0, "y": 2.0, "z": 3.0}
    assert paired_bootstrap(a, dict(reversed(a.items()))) == (0, 0, 0, 1)


class CountingLookups(dict):
    """A mapping that counts how often it is asked whether it has an id."""

    lookups = 0

    def __contains__(self, item):
        self.lookups += 1
        return super().__contains__(item)


def test_pairing_by_id_checks_each_id_once():
    a, b = CountingLookups.fromkeys(range(500), 1.0), dict.fromkeys(range(500), 1.0)
    paired_bootstrap(a, b, num_samples=1)
    assert a.lookups == 500


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 2], [1], "2 values against 1"),
        ({"x": 1}, {"y": 1}, "the ids do not match; .*'y'.*'x'"),
        ([], [], "at least one"),
        ([1], [None], "b: expected"),
    ],
)
def test_values_that_cannot_be_paired_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(a, b)


@pytest.mark.parametrize("values", [[], [None], ["x"], [float("nan")], [1, [2, 3]], None, "12", {}])
def test_values_without_an_interval_are_refused(values):
    with pytest.raises(ValueError, match="values: "):
        bootstrap(values)


@pytest.mark.parametrize("wrong", [{"confidence": 95}, {"confidence": 0}, {"num_samples": 0}])
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        bootstrap([1, 2], **wrong)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=30), st.integers(0, 3))
def test_an_interval_lies_within_the_values(values, seed):
    low, high = bootstrap(values, num_samples=50, seed=seed)
    assert min(values) <= low <= high <= max(values)
