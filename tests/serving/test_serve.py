"""The command line and the access rules of minigpt4.serve, in this process."""

import asyncio
import base64
import json
import os
import re
import subprocess
from argparse import ArgumentTypeError
from pathlib import Path

import httpx
import pytest
from PIL import Image
from starlette.datastructures import Headers

from minigpt4 import demo, serve
from minigpt4.serving.arguments import host_name, in_url
from minigpt4.serving.guard import Hosts
from minigpt4.serving.limits import Refusal
from minigpt4.serving.openai_app import OpenAI
from minigpt4.serving.serve import _hosts
from tests.small_release import jpeg_bytes

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ["--cfg-path", "eval_configs/minigpt4_eval.yaml"]


def parsed(*arguments):
    return serve.parse_args([*CONFIG, *arguments])


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(serve.API_KEY, raising=False)


@pytest.mark.parametrize("key", ["", " ", "\r\n"])
def test_an_empty_key_is_a_mistake(monkeypatch, capsys, key):
    monkeypatch.setenv(serve.API_KEY, key)
    with pytest.raises(SystemExit):
        parsed()
    assert "$MINIGPT4_API_KEY: empty; expected a key" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parsed("--api-key", key)


def test_a_key_is_taken_without_the_end_of_its_line(monkeypatch):
    assert parsed().api_key is None
    monkeypatch.setenv(serve.API_KEY, "a key\r\n")
    assert parsed().api_key == "a key"
    assert parsed("--api-key", " another ").api_key == "another"


@pytest.mark.parametrize("program", [serve, demo])
def test_an_empty_server_name_is_a_mistake(program, capsys):
    """A socket would listen on all addresses of the machine."""
    with pytest.raises(SystemExit):
        program.parse_args([*CONFIG, "--server-name", ""])
    assert "expected a name or an address of this machine" in capsys.readouterr().err
    assert program.parse_args([*CONFIG, "--server-name", "[::1]"]).server_name == "::1"


def test_an_ipv6_address_is_bracketed_in_urls():
    assert [in_url(name) for name in ("::1", "127.0.0.1", "a.b")] == ["[::1]", "127.0.0.1", "a.b"]
    with pytest.raises(ArgumentTypeError):
        host_name("[]")


@pytest.mark.parametrize(
    ("arguments", "is_warned"),
    [
        ([], False),
        (["--server-name", "0.0.0.0"], True),
        (["--server-name", "0.0.0.0", "--api-key", "short"], True),
        (["--server-name", "0.0.0.0", "--api-key", "k" * 16], False),
        (["--url", "https://its.example"], True),
    ],
)
def test_a_server_that_the_network_can_use_says_so(capsys, arguments, is_warned):
    _hosts(parsed(*arguments))
    assert ("The network can reach this server" in capsys.readouterr().err) == is_warned


def test_further_names_are_those_of_every_url():
    urls = ["its.example", "other.example:8000", "https://third.example/v1", "[2001:db8::7]"]
    hosts = _hosts(parsed(*[word for url in urls for word in ("--url", url)]))
    for host in ("its.example", "other.example", "third.example:80", "[2001:db8::7]:8000"):
        hosts.check(Headers({"host": host}))
    with pytest.raises(Refusal, match="start it with --url"):
        hosts.check(Headers({"host": "elsewhere.example"}))


@pytest.mark.parametrize("url", ["", "/v1", "https://", "file:///x", "a b", "[::1", "me@its.name"])
def test_a_url_without_a_host_is_a_mistake(url):
    with pytest.raises(ValueError, match="is no name or URL of this server"):
        _hosts(parsed("--url", url))


def test_the_root_path_of_a_proxy():
    hosts = Hosts("127.0.0.1")
    hosts.add_root("/minigpt4")
    assert hosts.public == set()
    hosts.add_root("https://its.name/minigpt4")
    assert hosts.public == {"its.name"}
    with pytest.raises(ValueError, match=r"^GRADIO_ROOT_PATH: expected .*, or a path$"):
        hosts.add_root("https://user:password@its.name/")


@pytest.fixture
def get(loaded):
    """A function: the replies of the API, with the key "schlüssel", to GET of (path, headers)."""
    api = OpenAI(*loaded, "tiny", Hosts("127.0.0.1"), api_key="schlüssel")

    async def replies(requests):
        transport = httpx.ASGITransport(api.asgi)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.get(path, headers=headers) for path, headers in requests]

    yield lambda *requests: asyncio.run(replies(requests))
    api.batches.close()


def key(text):
    return {"authorization": f"Bearer {text}".encode()}


def test_wrong_keys_do_not_lock_out_the_right_one(get):
    wrong = [{}, key(""), {"authorization": "Basic schlüssel".encode()}, *[key("x")] * 60]
    *refused, right = get(*[("/v1/models", each) for each in [*wrong, key("schlüssel")]])
    assert {reply.status_code for reply in refused} == {401} and right.status_code == 200


def test_an_address_with_a_slash_too_many_leads_nowhere(get):
    for reply in get(
        ("/v1/models/", {"host": "elsewhere.example"}), ("/health/", key("schlüssel"))
    ):
        assert reply.status_code in (404, 421) and "location" not in reply.headers


def test_the_curl_command_of_the_docs_takes_images_of_any_size(tmp_path):
    """An argument may have 128 KiB, so the image comes on standard input."""
    image = jpeg_bytes(Image.frombytes("RGB", (640, 480), os.urandom(640 * 480 * 3)))
    assert len(image) > 150_000
    (tmp_path / "image.jpg").write_bytes(image)
    docs = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"```bash\n(curl .*?)```", docs, re.DOTALL)
    # curl is replaced by a program that prints what it would send
    script = 'curl() { env true "$@" && cat; }\n' + command
    found = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, check=True)
    url = json.loads(found.stdout)["messages"][0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.partition(",")[2]) == image
