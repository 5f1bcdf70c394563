"""How much one request may hold and how often a password may be guessed; who asks for more gets a Refusal."""

import asyncio
import ipaddress
import re
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from starlette.datastructures import Headers, QueryParams
from starlette.types import Message, Receive, Scope

# of a request that uploads nothing; the longest message, escaped as JSON, has 393,216
MOST_BYTES = 2**19
MOST_DEPTH = 32  # of its JSON
TRIES_S = 60  # in so many seconds
TRIES_EACH, TRIES_ALL = 5, 50  # wrong passwords of one address and of all


class Refusal(Exception):
    """A request that is answered with `status` and a sentence."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Tries:
    """The wrong passwords of the last minute; the limit on all of them bounds the memory too."""

    def __init__(self):
        self._tries = deque()  # (when, address)

    def begin(self, address: str) -> tuple[float, str]:
        """Count a try, which `forgive` takes back. Raises Refusal when there were too many."""
        now = time.monotonic()
        while self._tries and self._tries[0][0] < now - TRIES_S:
            self._tries.popleft()
        own = [when for when, other in self._tries if other == address]
        if len(own) >= TRIES_EACH or len(self._tries) >= TRIES_ALL:
            raise Refusal(429, f"too many wrong passwords: wait {TRIES_S} seconds")
        self._tries.append((now, address))
        return self._tries[-1]

    def forgive(self, attempt: tuple[float, str]) -> None:
        """Forget a try: the password was right."""
        if attempt in self._tries:
            self._tries.remove(attempt)


class Streams:
    """The open streams by which answers reach browsers and programs, by gradio's name of the session."""

    def __init__(self):
        self._open = Counter()

    def is_open(self, session: str) -> bool:
        """Return whether somebody listens to a session."""
        return self._open[session] > 0

    @contextmanager
    def opened(self, scope: Scope) -> Iterator[None]:
        """Count a request, if it is one that listens, while the context lasts."""
        folder, name = scope["path"].rsplit("/", 1)
        session = QueryParams(scope["query_string"]).get("session_hash") if name == "data" else None
        session = name if folder.endswith("/call/chat") else session
        self._open[session] += 1
        try:
            yield
        finally:
            self._open[session] -= 1
            self._open += Counter()  # drops what is at zero


def network_of(scope: Scope) -> str:
    """Return the address of who asks; of IPv6 the network, for one person has all of it."""
    try:
        address = ipaddress.ip_address(scope["client"][0].partition("%")[0])
    except (TypeError, ValueError):
        return "unknown"
    return (
        str(ipaddress.ip_network((address, 64), strict=False))
        if address.version == 6
        else str(address)
    )


async def whole(receive: Receive, headers: Headers, most: int = MOST_BYTES) -> Receive:
    """Read a body; return a `receive` that gives it again. Raises Refusal for a large or deep one."""
    if "transfer-encoding" not in headers and headers.get("content-length", "0") == "0":
        return receive
    too_large = Refusal(413, f"more than {most:,} bytes: shorten the message")
    if int(headers.get("content-length", 0)) > most:
        raise too_large
    body, is_more = bytearray(), True
    while is_more:
        message = await receive()
        body += message.get("body", b"")
        is_more = message.get("more_body", False)
        if len(body) > most:
            raise too_large
    _check_depth(body)
    messages = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


async def discard(receive: Receive, headers: Headers) -> None:
    """Wait a moment for a small body that nobody will read, before its request is refused.

    Where bytes lie unread as a connection ends, its end overtakes the answer, and the client sees a reset.
    """
    with suppress(asyncio.TimeoutError, Refusal):
        await asyncio.wait_for(whole(receive, headers), 1)


def _check_depth(body: bytes | bytearray) -> None:
    """Raise Refusal for JSON so deep that whoever walks through it fails."""
    outside_strings = re.sub(rb'"[^"\\]*(?:\\.[^"\\]*)*"', b"", body, flags=re.DOTALL)
    depth = 0
    for bracket in re.findall(rb"[\[\]{}]", outside_strings):
        depth += 1 if bracket in b"[{" else -1
        if depth > MOST_DEPTH:
            raise Refusal(400, f"JSON nested more than {MOST_DEPTH} deep")
