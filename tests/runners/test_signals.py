"""Signals: the run saves after the step, reports what it saved, and ends; ignored signals stay ignored."""

import io
import itertools
import logging
import os
import signal
import sys

import pytest

from minigpt4.common.cli import Interrupted, run_program
from minigpt4.common.dist_utils import main_print
from minigpt4.runners.interruption import SIGNALS
from tests.training import batches, endless, runner, settings


@pytest.fixture(autouse=True)
def handlers():
    """Each test begins with the default handlers, and its run must restore them."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, how in before.items():
        signal.signal(number, how)


def run_with(tmp_path, *numbers, rank=0, **changes):
    """Return a runner that gets signals during its fourth step, on one rank."""
    run, steps = runner(settings(tmp_path / "out", **changes)), itertools.count(1)

    def train_step(model, samples):
        if next(steps) == 4:
            for number in numbers:
                os.kill(os.getpid(), number)
        return model(samples)["loss"]

    run.task.train_step = train_step
    return run


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_each_signal_saves_after_the_step(tmp_path, number, capsys):
    run = run_with(tmp_path, number)
    assert run_program(lambda: run.train(endless(batches()))) == 128 + number
    (path,) = run.output_dir.glob("*.pth")
    assert path.name == "checkpoint_0_iter_4.pth"
    words = f"ended by {number.name} before epoch 0, step 4: saved {path}, "
    assert words in capsys.readouterr().err
    assert all(signal.getsignal(each) is signal.SIG_DFL for each in SIGNALS)


def test_a_terminal_that_closes_sends_its_signal_twice(tmp_path):
    run = run_with(tmp_path, signal.SIGHUP, signal.SIGHUP, signal.SIGTERM)
    with pytest.raises(Interrupted, match="ended by SIGHUP") as caught:
        run.train(endless(batches()))
    assert caught.value.exit_code == 129


@pytest.mark.parametrize(
    "how", [signal.SIG_IGN, lambda *_: None], ids=["nohup", "handler of another"]
)
def test_what_is_ignored_or_answered_stays_so(tmp_path, how):
    signal.signal(signal.SIGHUP, how)
    run = run_with(tmp_path, signal.SIGHUP)
    run.train(endless(batches()))
    assert run.last_checkpoint.name == "checkpoint_1.pth" and signal.getsignal(signal.SIGHUP) is how


def test_under_torchrun_and_nohup_a_run_saves(tmp_path, monkeypatch):
    """torchrun handles SIGHUP even under nohup: it forwards it, and kills the ranks that are left 30 s later."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.delattr("torch.multiprocessing._prctl_pr_set_pdeathsig")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with pytest.raises(Interrupted, match="ended by SIGHUP before epoch 0, step 4: saved"):
        run_with(tmp_path, signal.SIGHUP).train(endless(batches()))
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_what_could_not_be_saved_is_not_said_to_be(tmp_path):
    run = run_with(tmp_path, signal.SIGUSR1, save_every_iters=2)
    (tmp_path / "out").mkdir()

    def full(model, samples, step=run.task.train_step, steps=itertools.count(1)):  # noqa: B008
        if next(steps) == 4:
            (run.output_dir / "checkpoint_0_iter_4.pth").mkdir()  # in place of the file
        return step(model, samples)

    run.task.train_step = full
    with pytest.raises(Interrupted) as caught:
        run.train(endless(batches()))
    last = run.output_dir / "checkpoint_0_iter_2.pth"
    assert (
        "step 4: what was trained since the last checkpoint could not be saved, see above: the last"
        in str(caught.value)
    )
    assert f"checkpoint is {last}; resume from it" in str(caught.value)


@pytest.mark.parametrize("hit", [0, 1])
def test_all_ranks_say_what_rank_0_saved(two_ranks, tmp_path, hit):
    def work(rank):
        run = run_with(tmp_path, *[signal.SIGUSR2] * (rank == hit))
        run_program(lambda: run.train(endless(batches())))
        print("trained")

    code, *said = two_ranks(work)
    (path,) = (tmp_path / "out").glob("*/*.pth")
    assert code == 0
    assert f"ended by SIGUSR2 before epoch 0, step 4: saved {path}, " in said[hit]
    assert (
        f"ended by a signal to another rank before epoch 0, step 4: saved {path}; resume"
        in said[1 - hit]
    )


@pytest.mark.parametrize(
    "start", [run_program, lambda train: train() and 0], ids=["program", "script"]
)
def test_a_folder_whose_name_cannot_be_printed_is_a_folder(tmp_path, monkeypatch, start):
    run = runner(settings(f"{tmp_path}/caf\udce9\u2028", max_epoch=1))
    with monkeypatch.context() as plain:
        # pytest's handlers keep text that cannot be sent to another process
        plain.setattr(logging.root, "handlers", [])
        plain.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
        assert not start(lambda: run.train(endless(batches())))
        said = (sys.stdout.flush(), sys.stdout.buffer.getvalue())[1]
    assert run.last_checkpoint.is_file()
    assert (rb"caf\udce9\u2028/" in said) is (start is run_program)


class Closed:
    """The output stream of a program whose terminal is closed."""

    def write(self, text):
        raise OSError(5, "Input/output error")

    flush = write


def test_a_closed_terminal_costs_its_lines(tmp_path, monkeypatch):
    with monkeypatch.context() as closed:
        closed.setattr("sys.stdout", Closed())
        closed.setattr("sys.stderr", Closed())
        main_print("lost")
        run = run_with(tmp_path, signal.SIGHUP)
        code = run_program(lambda: run.train(endless(batches())))
    assert code == 129 and [path.name for path in run.output_dir.glob("*.pth")] == [
        "checkpoint_0_iter_4.pth"
    ]
