"""Files from URLs: slow and retried transfers succeed, failed ones raise an error with curl's message."""

import shutil
import time

import pytest

from minigpt4.datasets.datasets import remote
from tests.survival.web_server import web_server

pytestmark = pytest.mark.skipif(
    shutil.which("curl") is None, reason="addresses are read through curl"
)


@pytest.fixture
def read(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "WAITS_S", (0, 0, 0))
    with web_server(tmp_path) as address:

        def read(kind, size=-1):
            with remote.open_url(f"{address}/{kind}/0.tar") as stream:
                return stream.read(size)

        yield read


def test_a_file_is_read_completely(read, tmp_path):
    whole = (tmp_path / "web.tar").read_bytes()
    assert read("good") == whole
    assert read("busy") == whole  # at the third attempt
    assert read("good", 700) == whole[:700]  # reading only a part is no error


@pytest.mark.parametrize(
    "kind, words",
    [("404", r"error: 404"), ("503", r"error: 503"), ("cut", r"curl: \(18\) .*missing|remaining")],
)
def test_a_failed_transfer_is_an_error(read, kind, words):
    with pytest.raises(OSError, match=words):
        read(kind)


def test_an_empty_file_is_read_as_one(tmp_path):
    """Its reader says what is wrong with it, and it is requested once."""
    with (
        web_server(tmp_path) as address,
        pytest.raises(ValueError, match="nothing in it"),
        remote.open_url(f"{address}/empty/0.tar") as stream,
    ):
        assert stream.read() == b""
        raise ValueError("nothing in it")


def test_curls_error_replaces_the_readers(tmp_path):
    with (
        web_server(tmp_path) as address,
        pytest.raises(OSError, match=r"curl: \(18\)"),
        remote.open_url(f"{address}/cut/0.tar") as stream,
    ):
        stream.read()
        raise ValueError("unexpected end of data")


def test_an_abandoned_stream_ends_immediately(tmp_path):
    with web_server(tmp_path) as address:
        manager = remote.open_url(f"{address}/stalls/0.tar")
        assert manager.__enter__().read(100)
        manager.gen.close()  # as when a loader is closed; the server would send nothing for two minutes


def test_a_slow_transfer_is_aborted_but_a_slow_reader_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "STALL_S", 1)
    with web_server(tmp_path) as address:
        with pytest.raises(OSError, match=r"too slow: \d+ bytes came in 1 s of waiting"):  # noqa: SIM117
            with remote.open_url(f"{address}/trickle/0.tar") as stream:
                stream.read()
        with remote.open_url(f"{address}/good/0.tar") as stream:
            first = stream.read(10)
            time.sleep(1.5)
            assert first + stream.read() == (tmp_path / "web.tar").read_bytes()


def test_brackets_in_an_address_are_not_expanded_by_curl(read, tmp_path):
    assert read("good/set[1-3]{a,b}") == (tmp_path / "web.tar").read_bytes()
