"""Limits on the size of a request and on wrong passwords; a request that exceeds one gets a Refusal."""

import asyncio
import ipaddress
import re
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from starlette.datastructures import Headers, QueryParams
from starlette.types import Message, Receive, Scope

# of a request that is no upload; the longest message has 393,216 as escaped JSON
MOST_BYTES = 2**19
MOST_DEPTH = 32  # of its JSON
DISCARD_S = 2  # to receive the rest of a request that is refused
TRIES_S = 60  # the period, in seconds, in which wrong passwords are counted
TRIES_EACH, TRIES_ALL = 5, 50  # wrong passwords of one address, of all addresses


class Refusal(Exception):
    """A request is refused, with an HTTP `status` and a message."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Tries:
    """The wrong passwords of the last TRIES_S seconds; the limit for all addresses also bounds the memory."""

    def __init__(self):
        self._tries = deque()  # (when, address)

    def begin(self, address: str) -> tuple[float, str]:
        """Count an attempt as wrong, until `forgive` takes it back. Raises Refusal after too many."""
        now = time.monotonic()
        while self._tries and self._tries[0][0] < now - TRIES_S:
            self._tries.popleft()
        own = [when for when, other in self._tries if other == address]
        if len(own) >= TRIES_EACH or len(self._tries) >= TRIES_ALL:
            raise Refusal(429, f"too many wrong passwords: wait {TRIES_S} seconds")
        self._tries.append((now, address))
        return self._tries[-1]

    def forgive(self, attempt: tuple[float, str]) -> None:
        """Take an attempt back: the password was right."""
        if attempt in self._tries:
            self._tries.remove(attempt)


class Streams:
    """Counts the open event streams by which clients receive answers, by gradio's session hash."""

    def __init__(self):
        self._open = Counter()

    def is_open(self, session: str) -> bool:
        """Return whether a client receives the events of a session."""
        return self._open[session] > 0

    @contextmanager
    def opened(self, scope: Scope) -> Iterator[None]:
        """Count a request while the context lasts, if it is an event stream."""
        session = None
        folder, name = scope["path"].rsplit("/", 1)
        if folder.endswith("/call/chat"):
            session = name
        elif name == "data":
            session = QueryParams(scope["query_string"]).get("session_hash")
        self._open[session] += 1
        try:
            yield
        finally:
            self._open[session] -= 1
            self._open += Counter()  # drops entries at zero


def network_of(scope: Scope) -> str:
    """Return the address of the client; for IPv6 its /64 network, which usually belongs to one person."""
    try:
        address = ipaddress.ip_address(scope["client"][0].partition("%")[0])
    except (TypeError, ValueError):
        return "unknown"
    if address.version == 6:
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


class Body:
    """The body of a request: the request's `receive`, which knows whether it has been read to the end."""

    def __init__(self, receive: Receive, headers: Headers):
        self._receive, self._length = receive, int(headers.get("content-length", 0))
        self._is_read = self._length == 0 and "transfer-encoding" not in headers
        # such a client sends the body only when it is first asked for
        self._is_held_back = headers.get("expect", "").lower() == "100-continue"

    async def __call__(self) -> Message:
        """Return the next ASGI message: a part of the body, or that the client has disconnected."""
        self._is_held_back = False
        message = await self._receive()
        self._is_read = not message.get("more_body", False)
        return message

    async def read(self, most: int = MOST_BYTES) -> Receive:
        """Read all of it, at most `most` bytes; return a `receive` that gives it again.

        Raises Refusal for a larger one, and for JSON that is nested too deeply.
        """
        if self._is_read:
            return self
        content = bytearray()
        while not self._is_read and max(self._length, len(content)) <= most:
            content += (await self()).get("body", b"")
        if max(self._length, len(content)) > most:
            raise Refusal(413, f"more than {most:,} bytes: shorten the message")
        _check_depth(content)
        messages = [{"type": "http.request", "body": bytes(content), "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await self()

        return replay

    async def discard(self) -> None:
        """Read the rest, for at most DISCARD_S, before the request is refused.

        A connection that is closed with unread bytes is reset, and the client may never see the answer.
        """
        if self._is_held_back:
            return
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._read_rest(), DISCARD_S)

    async def _read_rest(self) -> None:
        while not self._is_read:
            await self()


def _check_depth(body: bytes | bytearray) -> None:
    """Raise Refusal for JSON nested so deeply that a recursive reader would fail."""
    outside_strings = re.sub(rb'"[^"\\]*(?:\\.[^"\\]*)*"', b"", body, flags=re.DOTALL)
    depth = 0
    for bracket in re.findall(rb"[\[\]{}]", outside_strings):
        depth += 1 if bracket in b"[{" else -1
        if depth > MOST_DEPTH:
            raise Refusal(400, f"JSON nested more than {MOST_DEPTH} deep")
