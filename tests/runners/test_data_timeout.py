"""A process that waits for data too long names what it waits for and ends the run; no process hangs or is left over."""

import logging
import multiprocessing
import os
import re
import signal
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from minigpt4.datasets.datasets.base_dataset import Place
from minigpt4.datasets.datasets.dataloader_utils import EvalLoader
from minigpt4.runners import data_timeout
from minigpt4.runners.data_timeout import data_watched
from minigpt4.runners.interruption import Interruption
from tests.datasets.shards import folder_dataset, loader, shard, stream
from tests.survival.web_server import web_server


def stop_the_worker(batches):
    """Read one batch, so that the worker is running, then stop the worker."""
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGSTOP)


def training(folder):
    batches = iter(loader([stream(shard(folder, "only", range(40)))], num_workers=1))
    stop_the_worker(batches)
    return batches


def validation(folder):
    dataset = folder_dataset(folder, range(40))
    batches = iter(EvalLoader(dataset, Place(), 4, 1, 0.05))
    stop_the_worker(batches)
    return batches


def web(folder):
    """Read, in this process, from a server that sends half a file and then nothing."""
    with web_server(folder) as address:
        yield from loader([stream(f"{address}/stalls/far.tar")], batch_size=1)


class Signalled(Interruption):
    """The Interruption of a run that has received SIGTERM."""

    def __init__(self):
        super().__init__()
        self.signal = signal.SIGTERM


def program(make, folder, timeout_s, interruption):
    """Read batches as a run does, to their end."""
    sys.stderr = open(folder / "said.txt", "w", buffering=1)  # noqa: SIM115
    logging.basicConfig(stream=sys.stderr, force=True)
    with data_watched(timeout_s, interruption):
        list(islice(make(folder), 30))


@pytest.fixture
def run(tmp_path):
    """Return a function that runs `program` in a fork and returns (exit code, its output)."""
    started = []

    def run(*arguments):
        make, *others = arguments
        process = multiprocessing.get_context("fork").Process(
            target=program, args=(make, tmp_path, *others)
        )
        process.start()
        started.append(process)
        process.join(30)
        return process.exitcode, (tmp_path / "said.txt").read_text()

    yield run
    for process in started:
        process.kill()
        process.join()


def is_gone(pid):
    """Return whether a process ends within some seconds; a zombie counts as ended."""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(50):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    "make, whom",
    [
        (training, r"worker 0 \(process \d+\) of datasets\.laion, now in only\.tar"),
        (validation, r"worker 0 \(process \d+\) of datasets\.cc_sbu_align"),
        (web, r"a batch of datasets\.laion, now in far\.tar"),
    ],
)
def test_a_stopped_worker_is_named_and_ends_the_run(run, make, whom):
    code, said = run(make, 1.5, Interruption())
    assert code == 1
    worker = re.search(r"process (\d+)", said)
    assert worker is None or is_gone(int(worker[1]))
    assert re.search(
        rf"rank 0 has waited \d+ s for {whom} \(run\.step_timeout_s\)\. Ending the run; resume",
        said,
    )


def test_a_signal_ends_a_run_that_waits(run, monkeypatch):
    monkeypatch.setattr(data_timeout, "GRACE_S", 1)
    code, said = run(training, 300, Signalled())
    assert code == 128 + signal.SIGTERM
    assert "SIGTERM came, and nothing could be saved" in said


def test_data_that_comes_in_time_ends_nothing(run):
    def slow(folder):
        for batch in islice(loader([stream(shard(folder, "only", range(9)))]), 4):
            time.sleep(0.6)  # the time of a training step
            yield batch

    assert run(slow, 0.5, Interruption()) == (0, "")
