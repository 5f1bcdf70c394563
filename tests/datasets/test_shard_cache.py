"""The cache of shards: what is kept and removed, faults of its disk, several processes at once."""

import fcntl
import multiprocessing
import os
import random
import resource
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from minigpt4.datasets.datasets.remote import open_url
from minigpt4.datasets.datasets.shard_cache import USES, ShardCache
from tests.survival.web_server import web_server

SIZE = 100_000


class Reader:
    """A cache below `folder` with room for three of nine files; counts its uses."""

    def __init__(self, folder, max_bytes=3 * SIZE + 5000):
        self.source = folder / "source"
        self.cache = ShardCache(folder / "cache/of/shards", max_bytes)
        self.source.mkdir(exist_ok=True)
        for number in range(9):
            (self.source / str(number)).write_bytes(random.Random(number).randbytes(SIZE))
        self.counts, self.reasons = Counter(), []

    def note(self, use, why):
        self.counts[USES[use]] += 1
        self.reasons += [why] if why else []

    def opened(self, number, fetch=None):
        return self.cache.opened(f"s3://bucket/{number}", fetch or self.fetch, self.note)

    def fetch(self, address):
        return open(self.source / address[-1], "rb")

    def read(self, *numbers):
        for number in numbers:
            with self.opened(number) as file:
                assert file.read(700) + file.read() == (self.source / str(number)).read_bytes()

    def taken(self):
        """Return the counts since the last call: (read from the cache, kept, not kept)."""
        counts, self.counts = self.counts, Counter()
        return tuple(counts[use] for use in USES)

    def sizes(self):
        return [path.stat().st_size for path in self.cache.folder.iterdir() if path.name != ".lock"]


@pytest.fixture
def reader(tmp_path):
    return Reader(tmp_path)


def test_the_least_recently_used_are_removed_first(reader):
    reader.read(0, 1, 2)
    assert reader.taken() == (0, 3, 0) and reader.sizes() == [SIZE] * 3
    reader.read(0, 3)  # removes 1
    assert reader.taken() == (1, 1, 0)
    reader.read(0, 2, 3)
    assert reader.taken() == (3, 0, 0)
    reader.read(1)
    assert reader.taken() == (0, 1, 0) and reader.sizes() == [SIZE] * 3


def test_files_in_use_are_not_removed(reader):
    reader.read(0, 1, 2)
    with reader.opened(0), reader.opened(1), reader.opened(2):
        reader.read(3)  # there is no room for it
        assert reader.taken() == (3, 3, 1) and "in use" in reader.reasons[0]
        reader.read(0)
        assert reader.taken() == (1, 0, 0)
    reader.read(3)
    assert reader.taken() == (0, 1, 0)


def test_a_shard_larger_than_the_limit_is_read_without_caching(tmp_path):
    reader = Reader(tmp_path, max_bytes=SIZE - 1)
    reader.read(0)
    assert reader.taken() == (0, 0, 1) and reader.sizes() == []


def test_with_a_full_disk_shards_are_still_read(reader):
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))
    try:
        reader.read(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (
        reader.taken() == (0, 0, 1)
        and reader.reasons == ["[Errno 27] File too large"]
        and reader.sizes() == []
    )
    reader.read(0, 0)
    assert reader.taken() == (1, 1, 0)


def test_without_a_cache_folder_shards_are_still_read(reader):
    reader.cache.folder.parent.parent.touch()
    reader.read(0)
    assert reader.taken() == (0, 0, 2) and all("Not a directory" in why for why in reader.reasons)


def test_only_complete_files_are_kept(reader, tmp_path):
    with pytest.raises(ValueError, match="damaged"), reader.opened(0) as file:  # by its reader
        file.read(10)
        raise ValueError("damaged")
    stopped = reader.opened(1)
    stopped.__enter__().read(10)
    stopped.gen.close()  # as when a loader is closed
    with (
        web_server(tmp_path) as address,
        pytest.raises(OSError, match=r"curl: \(18\)"),
        reader.cache.opened(f"{address}/cut/0.tar", open_url, reader.note) as file,
    ):
        file.read()
    assert reader.taken() == (0, 0, 0) and reader.sizes() == []
    # a cached file that turns out to be damaged is fetched again
    reader.read(2)
    with pytest.raises(ValueError, match="damaged"), reader.opened(2):
        raise ValueError("damaged")
    reader.read(2)
    assert reader.taken() == (1, 2, 0)


def be_killed(reader):
    with reader.opened(0) as file:
        file.read(10)
        os.kill(os.getpid(), 9)


def test_files_of_a_killed_process_are_removed(reader):
    process = multiprocessing.get_context("fork").Process(target=be_killed, args=(reader,))
    process.start()
    process.join()
    assert len(reader.sizes()) == 1 and list(reader.cache.folder.glob("*.partial"))
    reader.read(1, 2, 3)
    assert reader.taken() == (0, 3, 0) and reader.sizes() == [SIZE] * 3


def test_a_file_is_renamed_while_no_other_process_counts_files(reader):
    """Another process that counted meanwhile might find it under neither name, and allow too many bytes."""
    reading = reader.opened(0)
    with ThreadPoolExecutor(1) as pool:
        stream = reading.__enter__()
        stream.read()
        with reader.cache.locked():
            ended = pool.submit(reading.__exit__, None, None, None)
            time.sleep(0.2)
            assert not ended.done() and list(reader.cache.folder.glob("*.partial"))
        ended.result()
    assert not list(reader.cache.folder.glob("*.partial")) and reader.sizes() == [SIZE]


def read_at_random(reader, seed):
    reader.taken()
    rng = random.Random(seed)
    for _ in range(20):
        reader.read(rng.randrange(9))
    assert sum(reader.taken()) == 20


def test_several_processes_share_it(reader):
    reader.read(0)
    processes = [
        multiprocessing.get_context("fork").Process(target=read_at_random, args=(reader, seed))
        for seed in range(4)
    ]
    for process in processes:
        process.start()
    largest = 0
    while any(process.is_alive() for process in processes):
        # a file may be removed meanwhile
        with open(reader.cache.folder / ".lock", "wb") as lock, suppress(FileNotFoundError):
            fcntl.flock(lock, fcntl.LOCK_EX)  # no file grows meanwhile
            largest = max(largest, sum(reader.sizes()))
        time.sleep(0.01)
    assert [process.exitcode for process in processes] == [0] * 4
    assert SIZE < largest <= reader.cache.max_bytes
    reader.read(*range(9))
    assert set(reader.sizes()) == {SIZE}
