"""One killed run of each stage, `python -m benchmarks kill` does twenty, with the real LLM."""

import random

import pytest

from benchmarks.kill import Trials, kill_while_saving


@pytest.mark.slow
def test_killed_runs_equal_uninterrupted_ones(cache, tmp_path):
    trials = Trials(tmp_path, cache, random.Random(3))
    for stage in ("stage1", "stage2"):
        (trial,) = trials.stage(stage, runs=1)
        assert trial["kills"] >= 1 and not trial["differs"], (stage, trial)
    assert "bad_shard" in str(trials.whole["stage1"]["counts"])
    assert len(trials.whole["stage1"]["losses"]) == 24


def test_the_harness_that_kills_while_saving_finds_torn_files():
    found = kill_while_saving(rounds=6, seed=1)["unreadable"]
    assert found["ours"] == 0
    assert found["torch.save to the same file"] > 0
