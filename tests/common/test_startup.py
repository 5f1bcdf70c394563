"""The timing of a program's start, and reading ahead of weight files."""

import logging
import os
from itertools import count
from types import SimpleNamespace

import pytest

from minigpt4.common import startup as module
from minigpt4.common.startup import Startup, files_of, read_ahead


def test_phases_are_all_of_the_time_and_an_inner_one_counts_for_itself(monkeypatch, caplog):
    """A wall clock that advances one second each time it is read, and a processor clock at a tenth of that."""
    ticks, work = count(100), count(0, 0.1)
    clock = SimpleNamespace(
        perf_counter=lambda: float(next(ticks)), process_time=lambda: next(work)
    )
    monkeypatch.setattr(module, "time", clock)
    startup = Startup()  # read once
    startup.begin("model")
    with startup.phase("ViT"):
        pass
    startup.begin("first step")
    with caplog.at_level(logging.INFO):
        startup.finish()
        startup.finish()
        startup.begin("later")
    assert startup.seconds == {"imports": 1, "model": 2, "ViT": 1, "first step": 1}
    assert sum(startup.cpu_seconds.values()) == pytest.approx(0.5)
    expected = "Start-up: 5.0 s to the end of the first step (imports 1.0, model 2.0, ViT 1.0, first step 1.0)"
    assert [record.getMessage() for record in caplog.records] == [expected]


def test_a_phase_ends_with_an_error_too():
    startup = Startup()
    with pytest.raises(ValueError), startup.phase("configuration"):
        raise ValueError
    startup.begin("model")
    startup.finish()
    assert list(startup.seconds) == ["imports", "configuration", "model"]


def test_a_folder_stands_for_its_weights(tmp_path):
    for name in ("b.bin", "2.safetensors", "1.safetensors", "config.json"):
        (tmp_path / name).touch()
    other = tmp_path / "b.bin"
    assert files_of([other, tmp_path]) == [
        other,
        tmp_path / "1.safetensors",
        tmp_path / "2.safetensors",
    ]


def is_cached(descriptor, offset):
    """Return whether a byte of a file is in the page cache."""
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except OSError:  # it would have to wait for the disk
        return False


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only Linux says what is in memory")
def test_read_ahead_fills_the_page_cache(tmp_path):
    """Also those after a file that does not exist, which is left to the code that uses it."""
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(2**25 + 5))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        offsets = [0, 2**24, 2**25]
        if any(is_cached(file.fileno(), offset) for offset in offsets):
            pytest.skip("this file system does not let go of a file in memory")
        read_ahead([tmp_path / "absent.pth", path]).join()
        assert all(is_cached(file.fileno(), offset) for offset in offsets)
