"""The shards that a `storage` refers to, and the checks before anything is read."""

import os
import shutil
import socket

import pytest

from minigpt4.datasets.datasets import shard_list
from minigpt4.datasets.datasets.shard_list import check_shards, expand_shards, open_file
from tests.datasets.shards import shard
from tests.survival.web_server import web_server


@pytest.mark.parametrize("name", ["set[1]", "a{b,c}", "what?", "x*", "a::b", "pipe:x"])
@pytest.mark.parametrize(
    "pattern", ["{:}", "{:}/0.tar", "{:}/{{0..1}}.tar", "{:}/*.tar", "{:}/[01].tar"]
)
def test_an_existing_path_is_not_a_pattern(tmp_path, monkeypatch, name, pattern):
    (tmp_path / name).mkdir()
    (tmp_path / "set1").mkdir()
    shards = [
        shard(folder, number, [])
        for folder in (tmp_path / name, tmp_path / "set1")
        for number in (0, 1)
    ]
    expected = shards[:1] if pattern.endswith("/0.tar") else shards[:2]
    if (
        "::" not in name or "/0.tar" in pattern or pattern == "{:}"
    ):  # else it is a list separated by ::
        assert expand_shards(f"{tmp_path}/{pattern.format(name)}") == expected


def test_a_pattern_may_include_folders(tmp_path):
    for folder in ("a1", "a2"):
        (tmp_path / folder).mkdir()
    shards = [shard(tmp_path / folder, "0", []) for folder in ("a1", "a2")]
    assert (
        expand_shards(f"{tmp_path}/a[12]/{{0..0}}.tar") == expand_shards(f"{tmp_path}/a*") == shards
    )
    assert expand_shards(f"{tmp_path}/a1/0.tar::{tmp_path}/a2/0.tar") == shards
    assert expand_shards(f"{tmp_path}/**/*.tar") == shards


def test_a_folder_stands_for_all_tars_below_it_once(tmp_path, monkeypatch):
    for folder in ("b", "a/deep"):
        (tmp_path / folder).mkdir(parents=True)
    shards = [shard(tmp_path / "a/deep", "1", []), shard(tmp_path / "b", "0", [])]
    (tmp_path / "b/notes.txt").touch()
    (tmp_path / "b/._0.tar").touch()
    (tmp_path / "a/round").symlink_to(tmp_path)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/link").symlink_to(tmp_path / "b")
    assert expand_shards(str(tmp_path)) == shards
    assert expand_shards(f"{tmp_path}/outside") == [f"{tmp_path}/outside/link/0.tar"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_shards("~/b/") == [f"{tmp_path}/b/0.tar"]


def test_brackets_in_addresses_are_taken_literally():
    assert expand_shards("https://[::1]:80/a[1]/{0..1}.tar") == [
        f"https://[::1]:80/a[1]/{n}.tar" for n in (0, 1)
    ]
    assert expand_shards("http://a/0.tar::http://b/0.tar") == ["http://a/0.tar", "http://b/0.tar"]


@pytest.mark.parametrize(
    "storage, message",
    [
        ("", "'' is no path of a shard"),
        ([" "], "' ' is no path of a shard"),
        ("x/{0..99999999999}.tar", "more than 10,000 shards"),
        ("x/{0..999}{0..999}.tar", "more than 10,000 shards"),
        (
            "https://a/*.tar",
            r"^'https://a/\*.tar': web servers are not searched; name the tar files, as https://host/\{",
        ),
        ("x/{0..1.tar", r"write ranges as \{00000\.\.00099\}"),
        ("${UNSET}/{0..1}.tar", "the variable UNSET is not set in the environment"),
    ],
)
def test_invalid_patterns_are_rejected(monkeypatch, storage, message):
    monkeypatch.setattr(shard_list, "MAX_SHARDS", 10_000)
    with pytest.raises(ValueError, match=message):
        expand_shards(storage)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"PAR1 and so on", "a parquet file"),
        (b"\x28\xb5\x2f\xfd zstd", "packed by zstd"),
        (b"PK\x03\x04", "a zip archive"),
        (b'{"shardlist": []}', "JSON, perhaps an index of shards"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"a Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"", "an empty file"),
        (b"noise" * 400, "no tar archive"),
    ],
)
def test_a_shard_in_another_format_is_rejected_with_an_explanation(tmp_path, content, message):
    good = shard(tmp_path, "0", range(2))
    (tmp_path / "1.tar").write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"^1 of 2 shards cannot be read: '{tmp_path}/1\.tar': {message}"
    ):
        check_shards([good, f"{tmp_path}/1.tar"], "*.tar")


@pytest.mark.parametrize(
    "kind", ["a FIFO", "a device", "a socket", "a folder without", "a link that leads nowhere"]
)
def test_anything_but_a_file_is_rejected_without_blocking(tmp_path, kind):
    path = tmp_path / "1.tar"
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a socket":
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))
    elif kind == "a folder without":
        path.mkdir()
        (path / "00000.parquet").touch()
    else:
        path.symlink_to("nowhere")
    shards = [shard(tmp_path, "0", range(2)), str(path)]
    with pytest.raises(
        ValueError, match=rf"1 of 2 shards are missing \(first missing: {path}\); there is {kind}"
    ):
        check_shards(shards, "*.tar")
    with pytest.raises(OSError):
        open_file(str(path))


def test_of_many_shards_some_are_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_list, "LOOKED_AT", 5)
    good = shard(tmp_path, "0", range(2))
    for number in range(1, 20):
        os.link(good, tmp_path / f"{number}.tar")
    shards = [f"{tmp_path}/{number}.tar" for number in range(20)]
    check_shards(shards, "")
    (tmp_path / "9.tar").unlink()
    (
        tmp_path / "9.tar"
    ).touch()  # one that the check does not open: a run counts it when it reads it
    check_shards(shards, "")
    for path in shards:
        os.unlink(path)
        open(path, "w").close()
    with pytest.raises(ValueError, match="5 of 5 shards cannot be read"):
        check_shards(shards, "")


@pytest.mark.skipif(shutil.which("curl") is None, reason="addresses are read through curl")
def test_the_first_address_of_each_host_is_requested(tmp_path):
    with web_server(tmp_path) as address, web_server(tmp_path) as other:
        good = [f"{address}/good/{number}.tar" for number in range(3)]
        check_shards([*good, f"{address}/404/0.tar"], "")
        with pytest.raises(ValueError, match=rf"^'{other}/404/0.tar': curl: \(22\) .*404"):
            check_shards([*good, f"{other}/404/0.tar"], "")
    check_shards(good, "")  # nobody answers now: left to the run


def test_addresses_without_curl(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="read by the program curl, which is not here; install it"):
        check_shards(["http://a.example/0.tar"], "")
