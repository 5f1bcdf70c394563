"""Two ranks: ended by a signal, with a rank or a worker lost, with a late rank; and resumed afterwards."""

import json
import os
import re
import signal
import time
from collections import deque
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from minigpt4.runners.step_timeout import LostWorkerError, StepTimeout
from tests.small_release import write_shard
from tests.survival.processes import children, kill_all, start_training
from tests.training import TinyModel, trained

STEPS = 60  # enough that even on a busy machine the run does not end before its signal


@pytest.fixture
def command(release, tmp_path, monkeypatch):
    """Return a function that starts training below a folder; its processes are killed after the test."""
    monkeypatch.setenv("TORCH_HOME", str(release.root / "torch"))
    (tmp_path / "data").mkdir()
    for number in range(5):
        write_shard(tmp_path / "data" / f"{number}.tar", range(20 * number, 20 * number + 20))
    started = []

    def arguments(name, **more):
        settings = {
            "run.iters_per_epoch": STEPS,
            "run.max_epoch": 1,
            "run.batch_size_train": 2,
            "run.amp": False,
        }
        settings |= {
            "run.num_workers": 2,
            "run.save_every_iters": 10,
            "run.output_dir": tmp_path / name,
        }
        for dataset in ("laion", "cc_sbu"):
            settings[f"datasets.{dataset}.build_info.storage"] = f"{tmp_path}/data/{{0..4}}.tar"
        settings |= more
        config = ["--cfg-path", "train_configs/minigpt4_stage1_pretrain.yaml", "--resume", "auto"]
        return config + release.options(**settings)

    def start(name, *launcher, **more):
        process = start_training(
            arguments(name, **more), tmp_path / f"{name}.txt", launcher=launcher
        )
        started.append(process)
        return process

    start.arguments = arguments
    yield start
    for process in started:
        kill_all(process)


def said(tmp_path, name):
    return (tmp_path / f"{name}.txt").read_text()


def steps(tmp_path, name):
    """Return {step: loss} so far; check that a step that was trained twice had the same loss."""
    found = {}
    for path in (tmp_path / name).glob("*/metrics.jsonl"):
        for line in path.read_text().splitlines():
            if line.endswith("}"):
                record = json.loads(line)
                assert found.setdefault(record["step"], record["loss"]) == record["loss"]
    return found


def wait_for(process, tmp_path, name, step):
    while process.poll() is None and step not in steps(tmp_path, name):
        time.sleep(0.02)
    assert process.poll() is None, said(tmp_path, name)[-3000:]


def is_at_work(pid):
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def finish(process, tmp_path, name, code=0):
    assert (process.wait(timeout=240) == 0) == (code == 0), said(tmp_path, name)[-3000:]


def weights(tmp_path, name):
    (path,) = (tmp_path / name).glob("*/checkpoint_0.pth")
    return torch.load(path, weights_only=True)["model"]["llama_proj.weight"]


def test_a_killed_worker_is_explained():
    """Killed as by the kernel when memory is full; torch raises its own error at any place of the program."""
    workers = iter(DataLoader(range(1000), num_workers=1, generator=torch.Generator()))
    next(workers)
    words = r"lost a process that reads data: .*lower run\.num_workers"
    with pytest.raises(LostWorkerError, match=words), StepTimeout(timeout_s=300).watching():
        os.kill(workers._workers[0].pid, signal.SIGKILL)
        deque(workers, maxlen=0)


def exchanges(lose, rank):
    """Run collectives as training does; `lose(rank, when)` is called before and after each arrival."""
    timeout = StepTimeout(timeout_s=5)  # longer than a busy machine may delay a rank
    with timeout.watching():
        for number in range(4):
            lose(rank, f"before {number}")
            timeout.arrived()
            lose(rank, f"within {number}")
            torch.distributed.all_reduce(torch.ones(3))
    print("made all")


def stop_within(rank, when):
    if (rank, when) == (1, "within 2"):
        os.kill(os.getpid(), signal.SIGSTOP)


def stay_away(rank, when):
    if (rank, when) == (1, "before 2"):
        time.sleep(60)


def take_long(rank, when):
    """All have arrived, and one takes its time, as when it saves or validates."""
    if (rank, when) == (1, "within 2"):
        time.sleep(9)


@pytest.mark.parametrize("lose", [stop_within, stay_away])
def test_a_rank_that_keeps_others_waiting_is_named_wherever_it_is(two_ranks, lose):
    code, said, _ = two_ranks(partial(exchanges, lose))
    assert code == 1
    assert re.search(
        r"rank 0 has waited \d+ s for rank 1 \(run.step_timeout_s\); it did not make step 3", said
    )


def test_a_rank_that_takes_its_time_is_waited_for(two_ranks):
    code, said, _ = two_ranks(partial(exchanges, take_long))
    assert code == 0 and said == "made all\n"


class SlowToSave(TinyModel):
    """Its first save takes longer than a rank may keep the others waiting."""

    seconds = 6

    def trainable_state_dict(self):
        time.sleep(self.seconds)
        self.seconds = 0
        return super().trainable_state_dict()


def test_a_checkpoint_that_takes_its_time_is_waited_for(two_ranks, tmp_path):
    def work(rank):
        changes = {"iters_per_epoch": 3, "max_epoch": 1, "save_every_iters": 2}
        trained(tmp_path, model=SlowToSave(), step_timeout_s=3, **changes)

    code, *said = two_ranks(work)
    assert code == 0, said
    assert {path.name for path in tmp_path.glob("*/*.pth")} == {
        "checkpoint_0_iter_2.pth",
        "checkpoint_0.pth",
    }


@pytest.mark.slow
def test_told_to_end_and_losing_a_rank(command, tmp_path, capsys):
    finish(command("whole"), tmp_path, "whole")

    # torchrun gets SIGTERM, as from a scheduler, and forwards it to the process groups of the ranks
    process = command("told")
    wait_for(process, tmp_path, "told", 13)
    process.send_signal(signal.SIGTERM)
    finish(process, tmp_path, "told", code=1)
    text = said(tmp_path, "told")
    words = r"ended by SIGTERM before epoch 0, step (\d+): saved (\S+\.pth), ([\d.]+) s after the signal"
    found = re.search(words, text)
    assert found and "DataLoader worker" not in text, text[-3000:]
    assert found[2].endswith(f"checkpoint_0_iter_{found[1]}.pth")
    state = torch.load(found[2], weights_only=True)["progress"]
    assert len(state["ranks"]) == 2 and state["position"] == {"epoch": 0, "step": int(found[1])}
    with capsys.disabled():
        print(f"\nSIGTERM to saved: {found[3]} s")

    # a rank is lost: torchrun starts both again, and they resume
    process = command("told", "--max-restarts=3")
    wait_for(process, tmp_path, "told", int(found[1]) + 2)  # steps of the resumed process
    lost = [pid for pid in children(process.pid) if children(pid)]
    os.kill(lost[1], signal.SIGKILL)
    wait_for(process, tmp_path, "told", int(found[1]) + 12)

    # torchrun forwards SIGUSR1 only if told to: here it dies of it, and its ranks save and end
    ranks = [pid for pid in children(process.pid) if children(pid)]
    assert len(ranks) == 2 and not set(ranks) & set(lost)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == -signal.SIGUSR1
    while any(map(is_at_work, ranks)):
        time.sleep(0.1)
    # the message is tested in test_signals
    assert len(list((tmp_path / "told").glob("*/*.pth"))) >= 2
    assert "Traceback" not in said(tmp_path, "told").removeprefix(text)

    finish(command("told"), tmp_path, "told")
    assert steps(tmp_path, "told") == steps(tmp_path, "whole")
    assert torch.equal(weights(tmp_path, "told"), weights(tmp_path, "whole"))
