"""Killed runs equal uninterrupted ones: one of stage 1 with the toy LLM, twenty of each stage with the real one."""

import random

import pytest

from tests.survival.kill import STAGES, Trials, kill_while_saving


@pytest.mark.slow
def test_a_killed_run_equals_the_uninterrupted_one(cache, tmp_path):
    trials = Trials(tmp_path, cache, random.Random(3))
    (trial,) = trials.stage("stage1", runs=1)
    assert trial["kills"] >= 1 and not trial["differs"], trial
    assert "bad_shard" in str(trials.whole["stage1"]["counts"])
    assert len(trials.whole["stage1"]["losses"]) == 24


@pytest.mark.survival
def test_many_killed_runs_equal_uninterrupted_ones(request, tmp_path):
    option = request.config.option
    trials = Trials(tmp_path, option.cache_root, random.Random(option.kill_seed))
    outcomes = {stage: trials.stage(stage, option.kill_runs) for stage in STAGES}
    differing = {
        stage: [trial for trial in found if trial["differs"]] for stage, found in outcomes.items()
    }
    assert not any(differing.values()), differing


def test_the_harness_that_kills_while_saving_finds_torn_files():
    unreadable = kill_while_saving(rounds=6, seed=1)
    assert unreadable["ours"] == 0
    assert unreadable["torch.save to the same file"] > 0


@pytest.mark.survival
def test_fifty_kills_while_saving_leave_no_torn_file(request):
    unreadable = kill_while_saving(rounds=50, seed=request.config.option.kill_seed)
    print(unreadable)
    assert unreadable["ours"] == 0
