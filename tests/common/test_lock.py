"""A second writer is refused with the name of the first; a process that ends, however it does, leaves no lock."""

import fcntl
import multiprocessing
import os
import signal
import time
from contextlib import ExitStack, suppress

import pytest

from minigpt4.common.lock import InUseError, locked

FORK = multiprocessing.get_context("fork")


def hold(target, is_held, seconds=60):
    with locked(target):
        # like a DataLoader's worker that outlives the process
        child = FORK.Process(target=time.sleep, args=(seconds,))
        child.start()
        is_held.put((os.getpid(), child.pid))
        time.sleep(seconds)


@pytest.fixture
def holder():
    """Return a function that lets another process hold a lock, and returns the process."""
    pids, started = FORK.Queue(), []

    def start(target):
        process = FORK.Process(target=hold, args=(target, pids))
        process.start()
        started.extend(pids.get(timeout=30))
        return process

    yield start
    for pid in started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("is_folder", [True, False])
def test_the_second_is_refused_by_name_until_the_first_is_killed(tmp_path, holder, is_folder):
    target = tmp_path if is_folder else tmp_path / "answers.jsonl"
    process = holder(target)
    words = rf"'{target}' is being written by process {process.pid} on \S+ since"
    with pytest.raises(InUseError, match=words), locked(target):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    # although the process that it forked is still alive, and the file still exists
    with locked(target):
        pass
    assert not list(tmp_path.iterdir())


def test_the_second_is_refused_within_one_process(tmp_path):
    with (
        locked(tmp_path / "a"),
        locked(tmp_path / "b"),
        pytest.raises(InUseError),
        locked(tmp_path / "a"),
    ):
        pass
    with locked(tmp_path / "a"):
        pass


def test_a_lock_that_was_deleted_and_taken_by_another_is_left_to_it(tmp_path):
    with ExitStack() as second:
        with locked(tmp_path):
            (tmp_path / ".lock").unlink()
            second.enter_context(locked(tmp_path))
        assert (tmp_path / ".lock").is_file()
        with pytest.raises(InUseError), locked(tmp_path):
            pass


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with locked(tmp_path):
        assert "cannot be locked ([Errno 38] Function not implemented)" in caplog.text


def test_what_cannot_be_locked_for_want_of_its_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), locked(tmp_path / "gone" / "answers.jsonl"):
        pass
