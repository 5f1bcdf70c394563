"""Shards in object stores, read from a real S3 server that fails now and then; checks before a run."""

import random
import re
import sys
from itertools import islice

import pytest

from minigpt4.datasets.datasets import object_store
from minigpt4.datasets.datasets.object_store import check_objects, open_object
from minigpt4.datasets.datasets.shard_cache import ShardCache
from minigpt4.datasets.datasets.shard_list import check_shards, expand_shards
from tests.datasets.shards import ids, loader, shard, stream
from tests.survival.s3_server import MISSING, REASON, put, s3_server

needs_s3 = pytest.mark.skipif(bool(MISSING), reason=REASON)
WHOLE = random.Random(0).randbytes(70_001)


@pytest.fixture(scope="module")
def s3():
    with s3_server() as address:
        for bucket in ("good", "503", "busy", "cut", "cut-twice"):
            put(address, f"{bucket}/a/0.tar", WHOLE)
        yield address


@pytest.fixture
def read(s3, monkeypatch):
    monkeypatch.setattr(object_store, "WAITS_S", (0, 0, 0))
    monkeypatch.setattr(object_store, "BLOCK", 30_000)

    def read(address):
        with open_object(address) as stream:
            return stream.read(700) + stream.read()

    return read


@needs_s3
@pytest.mark.parametrize("bucket", ["good", "busy", "cut-twice"])
def test_an_object_is_read_completely(read, bucket):
    assert read(f"s3://{bucket}/a/0.tar") == WHOLE


@needs_s3
@pytest.mark.parametrize(
    "address, words",
    [
        ("s3://good/a/1.tar", r"FileNotFoundError.*good/a/1\.tar"),
        ("s3://nowhere/a/1.tar", "FileNotFoundError"),
        ("s3://503/a/0.tar", "Service Unavailable"),
        ("s3://cut/a/0.tar", "payload is not completed|bytes came"),
    ],
)
def test_a_failed_transfer_is_an_error(read, address, words):
    with pytest.raises(Exception) as found:
        read(address)
    assert re.search(words, f"{type(found.value).__name__}: {found.value}")


@needs_s3
def test_the_first_shard_is_checked_before_a_run(s3, monkeypatch):
    monkeypatch.setattr(object_store, "WAITS_S", (0, 0, 0))
    check_shards(expand_shards("s3://good/a/{0..9}.tar"), "")
    check_shards(
        expand_shards("s3://503/a/0.tar"), ""
    )  # the store may answer by the time of the run
    with pytest.raises(ValueError, match=r"'s3://good/b/0\.tar': FileNotFoundError"):
        check_shards(expand_shards("s3://good/b/{0..9}.tar"), "")


def batches_from(storage, cache=None, state=None, number=12):
    """Return the sample IDs of some batches, and the loader."""
    dataset = stream(storage)
    dataset.shard_cache = cache
    batches = loader([dataset])
    if state:
        batches.resume(state)
    return ids(islice(batches, number)), batches


@needs_s3
def test_a_stream_resumes_exactly_with_a_cache_smaller_than_the_data(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(object_store, "WAITS_S", (0, 0, 0))
    files = [tmp_path / f"{number}.tar" for number in range(4)]
    for number, path in enumerate(files):
        shard(tmp_path, number, range(6 * number, 6 * number + 6))
        put(s3, f"cut-twice/{path.name}", path)
    expected, _ = batches_from(f"{tmp_path}/{{0..3}}.tar")

    cache = ShardCache(tmp_path / "cache", 2 * files[0].stat().st_size + 1000)
    first, stopped = batches_from("s3://cut-twice/{0..3}.tar", cache, number=5)
    rest, resumed = batches_from("s3://cut-twice/{0..3}.tar", cache, stopped.state(), number=7)
    assert first + rest == expected and len(expected) == 48  # two epochs
    assert stopped.skip_report() == {"laion": {"seen": 20}} and resumed.skip_report() == {
        "laion": {"seen": 48}
    }
    counts = resumed.datasets[0].cache_counts()
    assert counts["kept in it"] and counts["shards read from it"] and not counts["not kept"]
    assert 0 < sum(path.stat().st_size for path in cache.folder.iterdir()) <= cache.max_bytes


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    words = r"'gs://bucket/0\.tar' needs the package gcsfs \(.*\): pip install gcsfs"
    with pytest.raises(ValueError, match=words):
        check_objects(["gs://bucket/0.tar"])
    with pytest.raises(ValueError, match=words), open_object("gs://bucket/0.tar"):
        pass


def test_object_store_addresses_cannot_have_wildcards():
    expected = [f"hf://datasets/me/set/{number}.tar" for number in (0, 1)]
    assert expand_shards("hf://datasets/me/set/{0..1}.tar") == expected
    assert expand_shards("s3://a/0.tar::gs://b/0.tar") == ["s3://a/0.tar", "gs://b/0.tar"]
    for storage in ("s3://bucket/*.tar", "s3://bucket/folder/"):
        with pytest.raises(ValueError, match="object stores are not searched; name the tar files"):
            expand_shards(storage)
    with pytest.raises(ValueError, match="names no bucket"):
        expand_shards("s3:///0.tar")
