"""The images of a chat completion: data URLs and, if allowed, files at public http(s) addresses."""

import asyncio
import base64
import binascii
import hashlib
import ipaddress
import re
import socket
from urllib.parse import urljoin, urlsplit

import httpx

from minigpt4.conversation.chat import Chat
from minigpt4.processors.images import load_image
from minigpt4.serving.openai_batches import Pixels
from minigpt4.serving.session import MAX_PIXELS

MOST_BYTES = 20 * 10**6  # of one image, as on the page
FETCH_S = 20  # to fetch one image, including redirects
MOST_REDIRECTS = 3
_DATA = re.compile(r"data:image/[\w.+-]{1,40};base64,", re.ASCII | re.IGNORECASE)
# not compressed, since `_body` does not decompress; some sites refuse the user agents of libraries
_HEADERS = {"accept": "image/*", "accept-encoding": "identity", "user-agent": "minigpt4-serve"}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # it wraps any IPv4 address
# the IPv6 addresses in use; beside them are forms that some system may still route to an IPv4 address or a site
_IN_USE = ipaddress.ip_network("2000::/3")


class Images:
    """Reads images for the model of `chat`; `is_fetching`: whether http(s) addresses are fetched."""

    def __init__(self, chat: Chat, is_fetching: bool):
        self.chat, self.is_fetching = chat, is_fetching
        # an image of 36 million pixels takes 100 MiB while it is decoded
        self._decoding = asyncio.Semaphore(2)

    async def read(self, url: str) -> Pixels:
        """Return the image of a URL. Raises ValueError or OSError with the reason if it cannot be read."""
        data = await self._content(url)
        async with self._decoding:
            return await asyncio.to_thread(self._decoded, data)

    async def _content(self, url: str) -> bytes:
        if match := _DATA.match(url):
            return await asyncio.to_thread(_from_base64, url, match.end())
        if not re.match("https?://", url, re.IGNORECASE):
            raise ValueError(f"image_url {url[:40]!r}: expected data:image/..;base64,..")
        if not self.is_fetching:
            raise ValueError(
                "image_url: this server does not fetch addresses (--fetch-images allows it); "
                "send data:image/..;base64,.."
            )
        try:
            return await asyncio.wait_for(fetch(url), FETCH_S)
        except (TimeoutError, asyncio.TimeoutError):
            raise OSError(f"image_url {url[:200]!r}: not there within {FETCH_S} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise OSError(f"image_url {url[:200]!r}: {type(error).__name__} {error}") from error

    def _decoded(self, data: bytes) -> Pixels:
        try:
            image = load_image(data, MAX_PIXELS)
        except ValueError as error:
            raise ValueError(f"image_url: {error}; expected an image") from error
        return Pixels(hashlib.sha256(data).digest(), self.chat.vis_processor(image))


def _from_base64(url: str, start: int) -> bytes:
    if len(url) - start > MOST_BYTES * 4 // 3 + 4:
        raise ValueError(f"image_url: more than {MOST_BYTES:,} bytes")
    try:
        return base64.b64decode(url[start:], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"image_url: {error}; expected base64 behind the comma") from error


async def fetch(url: str) -> bytes:
    """Return the content of a public http(s) address.

    Each host, also that of a redirect, is resolved once, and contacted at the IP address that was checked: a name that
    resolves differently a moment later (DNS rebinding) gains nothing. Raises OSError, ValueError or httpx's errors.
    """
    async with httpx.AsyncClient(timeout=FETCH_S, trust_env=False) as client:
        for _ in range(MOST_REDIRECTS + 1):
            target = httpx.URL(url)
            if target.scheme not in ("http", "https") or not target.host:
                raise ValueError(f"image_url {url[:200]!r}: expected an http(s) address")
            address = await public_address(
                target.host, target.port or {"http": 80, "https": 443}[target.scheme]
            )
            request = client.build_request(
                "GET",
                target.copy_with(host=address, userinfo=b"", fragment=None),
                headers=_HEADERS | {"host": target.netloc.decode("ascii")},
                extensions={"sni_hostname": target.raw_host.decode("ascii")},
            )
            reply = await client.send(request, stream=True)
            try:
                if not reply.has_redirect_location:
                    return await _body(reply, url)
                url = urljoin(url, reply.headers["location"])
            finally:
                await reply.aclose()
    raise OSError(f"image_url: more than {MOST_REDIRECTS} redirects")


async def public_address(host: str, port: int) -> str:
    """Return an IP address of a host. Raises OSError if it has none, or any that is not public."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise OSError(f"image_url: host {host[:100]!r}: {error}") from error
    addresses = [entry[4][0] for entry in found]
    for address in addresses:
        if not is_public(address):
            raise OSError(
                f"image_url: host {host[:100]!r} is not in the public internet: not fetched"
            )
    return addresses[0]


def is_public(address: str) -> bool:
    """Return whether an IP address is public; of an IPv6 address that wraps an IPv4 one, whether that is."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.ip_address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip not in _IN_USE:
            return False
    return ip.is_global and not ip.is_multicast


async def _body(reply: httpx.Response, url: str) -> bytes:
    if reply.status_code != 200:
        raise OSError(f"image_url {urlsplit(url).netloc[:100]!r}: status {reply.status_code}")
    body = bytearray()
    # not decompressed: a small response could become a huge one
    async for chunk in reply.aiter_raw():
        body += chunk
        if len(body) > MOST_BYTES:
            raise ValueError(f"image_url: more than {MOST_BYTES:,} bytes")
    return bytes(body)
