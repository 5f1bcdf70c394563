"""The environment in which the page starts: proxies, and a place for uploads."""

import http.server
import os
import stat
import threading
from pathlib import Path
from unittest import mock

import httpx
import pytest

from minigpt4.serving.demo import environment_of_gradio

NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def own_address():
    """Return the address of a server on this machine."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    "proxies",
    [
        *[
            {name: NOWHERE}
            for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy")
        ],
        {"http_proxy": NOWHERE, "no_proxy": ".example"},
        {"http_proxy": NOWHERE, "NO_PROXY": "example.org,10.0.0.0/8"},
    ],
    ids=str,
)
def test_no_proxy_stands_between_the_page_and_itself(own_address, proxies, share, tmp_path):
    with mock.patch.dict(os.environ, {**proxies, "GRADIO_TEMP_DIR": str(tmp_path)}):
        if "https_proxy" not in proxies:
            with pytest.raises(httpx.TransportError):
                httpx.get(own_address)
        with environment_of_gradio("myhost", share):
            assert httpx.head(own_address).status_code == 200
            kept = {name for name in os.environ if name.lower().endswith("_proxy")} - {
                "no_proxy",
                "NO_PROXY",
            }
            assert kept == (
                {name for name in proxies if name.lower() != "no_proxy"} if share else set()
            )
            for name in ("no_proxy", "NO_PROXY"):
                exempt = os.environ[name].split(",")
                assert {"localhost", "127.0.0.1", "::1", "myhost"} <= set(exempt)
                assert (
                    proxies.get("NO_PROXY", proxies.get("no_proxy", "myhost")).split(",")[0]
                    in exempt
                )


def test_a_proxy_that_httpx_cannot_use_does_not_matter(own_address, tmp_path):
    with mock.patch.dict(
        os.environ, {"all_proxy": "socks5://127.0.0.1:9", "GRADIO_TEMP_DIR": str(tmp_path)}
    ):
        with pytest.raises(ImportError):
            httpx.get(own_address)
        with environment_of_gradio("127.0.0.1", share=False):
            assert httpx.head(own_address).status_code == 200


def test_uploads_have_a_folder_of_their_own_that_is_removed(tmp_path):
    with mock.patch.dict(os.environ, {"GRADIO_TEMP_DIR": str(tmp_path / "new")}):
        with environment_of_gradio("127.0.0.1", share=False):
            folder = Path(os.environ["GRADIO_TEMP_DIR"])
            assert (
                folder.parent == tmp_path / "new" and stat.S_IMODE(folder.stat().st_mode) == 0o700
            )
            (folder / "image.png").write_bytes(b"x")
        assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("kind", ["GRADIO_TEMP_DIR is a file", "no temporary folder at all"])
def test_no_place_for_uploads_is_a_sentence(tmp_path, monkeypatch, kind):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("GRADIO_TEMP_DIR", raising=False)
    if kind == "GRADIO_TEMP_DIR is a file":
        monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "file" / "below"))
    else:
        # as on a machine without a writable folder
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    refused = pytest.raises(
        OSError, match=r"no place for the images that visitors upload: .*; set GRADIO_TEMP_DIR to"
    )
    with mock.patch.dict(os.environ), refused, environment_of_gradio("127.0.0.1", share=False):
        raise AssertionError("not reached")
