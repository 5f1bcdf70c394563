"""The folder of a run: locked for one run at a time, followed when it is moved; the latest run is resumed."""

import itertools
import os
import shutil
import time

import pytest

from minigpt4.common.lock import InUseError, locked
from minigpt4.runners.run_folder import newest_checkpoint
from tests.training import batches, endless, runner, settings, trained

AUTO = {"resume_ckpt_path": "auto", "save_every_iters": 2, "max_epoch": 1}


def train_and_do(run, step, do):
    """Train `run`, calling `do(run)` before a step."""
    train_step, steps = run.task.train_step, itertools.count()

    def train(model, samples):
        if next(steps) == step:
            do(run)
        return train_step(model, samples)

    run.task.train_step = train
    run.train(endless(batches()))


def start_again(is_refused, **changes):
    """Return a function that starts a second run in the first one's folders."""

    def do(run):
        second = runner(settings(run.output_dir.parent, **AUTO | changes))
        if not is_refused:
            second.train(endless(batches()))
            assert second.output_dir != run.output_dir
            return
        with pytest.raises(InUseError, match=rf"is being written by process {os.getpid()} on "):
            second.train(endless(batches()))

    return do


@pytest.mark.parametrize("step", [0, 3], ids=["before its first checkpoint", "behind it"])
def test_a_second_run_that_resumes_the_same_is_refused(tmp_path, step):
    run = runner(settings(tmp_path, **AUTO))
    train_and_do(run, step, start_again(is_refused=True))
    # and no lock is left
    assert [path.name for path in tmp_path.iterdir()] == [run.output_dir.name]
    assert {path.name for path in run.output_dir.glob(".*")} == set()
    again = trained(tmp_path, **AUTO | {"max_epoch": 2})
    assert again.output_dir == run.output_dir


def test_what_a_run_began_for_itself_is_not_resumed_by_another(tmp_path):
    run = runner(settings(tmp_path, **AUTO | {"resume_ckpt_path": None}))
    train_and_do(run, 3, start_again(is_refused=True))


def test_another_run_beside_it_has_a_folder_of_its_own(tmp_path):
    run = runner(settings(tmp_path, **AUTO))
    train_and_do(run, 3, start_again(is_refused=False, resume_ckpt_path=None))


def test_all_ranks_are_refused(two_ranks, tmp_path):
    def work(rank):
        with pytest.raises(InUseError, match=f"is being written by process {os.getppid()} on "):
            runner(settings(tmp_path, **AUTO)).train(endless(batches()))
        print("refused")

    with locked(tmp_path):
        assert two_ranks(work) == (0, "refused\n", "refused\n")


def test_a_renamed_folder_is_followed(tmp_path, caplog):
    def rename(run):
        run.output_dir.rename(tmp_path / "renamed")

    run = runner(settings(tmp_path / "out", **AUTO))
    train_and_do(run, 3, rename)
    moved = tmp_path / "renamed"
    assert run.last_checkpoint == moved / "checkpoint_0.pth" and run.last_checkpoint.is_file()
    assert f"is now '{moved}': the run goes on there" in caplog.text
    # the line of the step during which it was moved is lost
    assert (moved / "metrics.jsonl").read_text().count("\n") == 5
    assert "train_loss" in (moved / "log.txt").read_text() and not list(
        (tmp_path / "out").iterdir()
    )


def test_a_deleted_folder_is_made_again(tmp_path, caplog):
    run = runner(settings(tmp_path, **AUTO))
    train_and_do(run, 3, lambda run: shutil.rmtree(run.output_dir))
    assert "is gone, with what was in it; it is made again" in caplog.text
    names = {path.name for path in run.output_dir.iterdir()}
    assert names >= {"checkpoint_0_iter_4.pth", "checkpoint_0.pth", "metrics.jsonl", "log.txt"}


@pytest.mark.parametrize("name", ["runs [lr=1e-4]", "*", "a?b", "[!x]", "ä\u0308 \U0001f600"])
def test_any_name_of_a_folder_is_resumed(tmp_path, name):
    first = trained(tmp_path / name, **AUTO)
    assert trained(tmp_path / name, **AUTO | {"max_epoch": 2}).output_dir == first.output_dir


def test_the_run_that_began_last_is_resumed_whatever_the_times_of_files_say(tmp_path):
    made = trained(tmp_path / "made", **AUTO).last_checkpoint
    names = ["202601010000", "202601010000-2", "202601010000-10", "202512312359"]
    now = time.time()
    # the time of the first file lies in the future
    for name, age in zip(names, (-(10**6), 0, 10, 10**6), strict=True):
        (tmp_path / "out" / name).mkdir(parents=True)
        shutil.copy(made, tmp_path / "out" / name)
        os.utime(tmp_path / "out" / name / made.name, (now - age, now - age))
    assert newest_checkpoint(tmp_path / "out").parent.name == "202601010000-10"
    # names given by a user say no time, so the files' times count, and one in the future counts as now
    shutil.copytree(tmp_path / "out" / "202601010000", tmp_path / "named" / "future")
    os.utime(tmp_path / "named" / "future" / made.name, (now + 10**6, now + 10**6))
    shutil.copytree(tmp_path / "out" / "202512312359", tmp_path / "named" / "old")
    assert newest_checkpoint(tmp_path / "named").parent.name == "future"


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    first = trained(tmp_path, **AUTO)
    for name in ("checkpoint_0.pth.partial", "checkpoint_1_iter_4.pth.123.partial"):
        (first.output_dir / name).write_bytes(b"half")
    trained(tmp_path, **AUTO | {"max_epoch": 2})
    assert not list(first.output_dir.glob("*.partial"))
