"""Fetching images: only from public addresses, and no more than the size of an image."""

import asyncio
import base64
import gzip
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from minigpt4.processors.images import load_image
from minigpt4.serving import openai_images
from minigpt4.serving.guard import Hosts
from minigpt4.serving.openai_app import OpenAI
from minigpt4.serving.openai_images import Images, fetch, is_public, public_address
from tests.small_release import jpeg_bytes, picture

PRIVATE = [
    "127.0.0.1",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
]
PRIVATE += ["224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1"]
PRIVATE += ["::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::"]
PRIVATE += ["2001:0:4136:e378:8000:63bf:80ff:fffe"]
# of a site, local NAT64, and two forms that once held IPv4 addresses
PRIVATE += ["fec0::1", "64:ff9b:1::7f00:1", "::127.0.0.1", "::ffff:0:7f00:1"]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_inside_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
)
def test_addresses_of_the_internet_are(address):
    assert is_public(address)


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f.1", "[::1]", "0"])
def test_names_of_this_machine_are_refused(host):
    with pytest.raises(OSError, match=r"not in the public internet|image_url: host"):
        asyncio.run(public_address(host.strip("[]"), 80))


class Files(BaseHTTPRequestHandler):
    """What strangers' servers do."""

    def do_GET(self):
        if self.path == "/image.jpg":
            self._send(200, jpeg_bytes(picture(1)))
        elif self.path == "/moved":
            self._send(302, b"", location="/image.jpg")
        elif self.path == "/nowhere":
            self._send(302, b"")
        elif self.path == "/compressed" and "gzip" in self.headers["accept-encoding"]:
            self._send(200, gzip.compress(jpeg_bytes(picture(1))), **{"content-encoding": "gzip"})
        elif self.path == "/compressed":
            self._send(200, jpeg_bytes(picture(1)))
        elif self.path == "/inside":
            self._send(302, b"", location="http://10.0.0.1/secret.jpg")
        elif self.path == "/file":
            self._send(302, b"", location="file:///etc/passwd")
        elif self.path == "/circle":
            self._send(302, b"", location="/circle")
        elif self.path == "/large":
            self._send(200, bytes(openai_images.MOST_BYTES + 1))
        elif self.path == "/slow":
            self.server.released.wait(30)
            self._send(200, b"late")
        else:
            self._send(404, b"")

    def _send(self, status, content, **headers):
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:
            pass  # the reader has had enough

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch):
    """A server whose address counts as public; no other does."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.released = threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(openai_images, "is_public", lambda address: address == "127.0.0.1")
    yield f"http://127.0.0.1:{server.server_port}"
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("path", ["image.jpg", "moved", "compressed"])
def test_an_image_is_fetched(site, path):
    assert asyncio.run(fetch(f"{site}/{path}")) == jpeg_bytes(picture(1))


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("inside", "not in the public internet"),
        ("file", "expected an http"),
        ("circle", "more than 3 redirects"),
        ("large", "more than 20,000,000 bytes"),
        ("absent", "status 404"),
        ("nowhere", "status 302"),
    ],
)
def test_what_is_no_image_of_the_internet_is_refused(site, path, says):
    with pytest.raises((OSError, ValueError), match=says):
        asyncio.run(fetch(f"{site}/{path}"))


def test_fetched_for_the_model_within_a_time(site, loaded, monkeypatch):
    chat, _ = loaded

    async def read(url):
        return await Images(chat, is_fetching=True).read(url)

    expected = chat.vis_processor(load_image(jpeg_bytes(picture(1))))
    assert asyncio.run(read(f"{site}/image.jpg")).values.equal(expected)
    with pytest.raises(OSError, match="status 404"):
        asyncio.run(read(f"{site}/absent"))
    monkeypatch.setattr(openai_images, "FETCH_S", 0.5)
    with pytest.raises(OSError, match="not there within"):
        asyncio.run(read(f"{site}/slow"))


def test_a_request_with_an_address(site, loaded):
    """Through the API as it is served: the answer is that to the same image in the request."""
    api = OpenAI(*loaded, "tiny", Hosts("127.0.0.1"), is_fetching=True)
    data = base64.b64encode(jpeg_bytes(picture(1))).decode()

    async def ask(*urls):
        transport = httpx.ASGITransport(api.asgi)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            replies = []
            for url in urls:
                content = [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": "what is this?"},
                ]
                request = {"model": "tiny", "temperature": 0, "max_tokens": 8}
                request["messages"] = [{"role": "user", "content": content}]
                replies.append(await client.post("/v1/chat/completions", json=request))
            return replies

    urls = (f"{site}/image.jpg", f"data:image/jpeg;base64,{data}", f"{site}/inside")
    fetched, sent, refused = asyncio.run(ask(*urls))
    api.batches.close()
    texts = [reply.json()["choices"][0]["message"]["content"] for reply in (fetched, sent)]
    assert texts[0] == texts[1] and texts[0]
    assert refused.status_code == 400
    assert "not in the public internet" in refused.json()["error"]["message"]
