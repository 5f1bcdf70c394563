"""The files that visitors upload: who may see which, and how many are kept."""

import asyncio
import json
import re
import secrets
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from stat import S_ISREG

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import Message, Scope, Send

from minigpt4.serving.limits import Refusal, network_of

# most (files, bytes) of one visitor and of all visitors; beyond them the oldest files are removed
EACH = (200, 400 * 2**20)
ALL = (2_000, 2 * 2**30)
MOST_UPLOAD_BYTES = 170 * 2**20  # of one request: eight images of 20 MB


class Uploads:
    """The files in `folder`, which only this page uses. Those in `public` are visible to everybody.

    A visitor is identified by a cookie, without one by its address.
    """

    def __init__(self, folder: str | Path, public: Iterable[str]):
        self.folder, self.public = Path(folder), set(public)
        self._files = {}  # (visitor, path) -> size in bytes, the latest last
        self._running = 0  # bytes of the uploads in progress

    def visitor(self, scope: Scope, headers: Headers) -> str:
        """Return the visitor who sends a request."""
        cookie = re.search(
            rf"(?:^|; ?){_cookie(scope)}=([\w-]{{22}})(?:;|$)", headers.get("cookie", ""), re.ASCII
        )
        return cookie[1] if cookie else network_of(scope)

    def setting_cookie(self, scope: Scope, visitor: str, send: Send) -> Send:
        """Return a `send` that gives a visitor of the page a cookie, unless it has one."""
        if scope["path"] != "/" or visitor != network_of(scope):
            return send

        async def send_with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start":
                cookie = (
                    f"{_cookie(scope)}={secrets.token_urlsafe(16)}; Path=/; HttpOnly; SameSite=Lax"
                )
                MutableHeaders(scope=message).append("set-cookie", cookie)
            await send(message)

        return send_with_cookie

    def check(self, visitor: str, path: str) -> None:
        """Raise Refusal for a file that is not the visitor's own."""
        if path not in self.public and (visitor, path) not in self._files:
            raise Refusal(404, "there is no such image, or no longer")

    @asynccontextmanager
    async def room(self, headers: Headers) -> AsyncIterator[None]:
        """Make room for an upload of the request's Content-Length. Raises Refusal if it is too large."""
        length = int(headers.get("content-length", -1))
        if length < 0:
            raise Refusal(411, "an upload needs the header Content-Length")
        if length > MOST_UPLOAD_BYTES or self._running + length > ALL[1]:
            raise Refusal(
                413, f"too much at once: at most {MOST_UPLOAD_BYTES:,} bytes in one upload"
            )
        self._running += length
        try:
            await asyncio.to_thread(_remove_oldest, self.folder, ALL[0], ALL[1] - self._running)
            yield
        finally:
            self._running -= length

    def recording(self, visitor: str, send: Send) -> Send:
        """Return a `send` that records the files named in gradio's answer to an upload as the visitor's."""
        answer = {"status": 0, "body": b""}

        async def send_and_record(message: Message) -> None:
            answer["status"] = message.get("status", answer["status"])
            answer["body"] += message.get("body", b"")
            is_end = message["type"] == "http.response.body" and not message.get("more_body")
            if is_end and answer["status"] == 200:
                self._record(visitor, json.loads(answer["body"]))
            await send(message)

        return send_and_record

    def _record(self, visitor: str, paths: list[str]) -> None:
        """Record a visitor's files, the latest last; remove the oldest beyond EACH, and forget those beyond ALL."""
        for path in paths:
            self._files.pop((visitor, path), None)
            with suppress(FileNotFoundError):  # already removed, to make room for others
                self._files[visitor, path] = Path(path).stat().st_size
        own = [(path, size) for (other, path), size in self._files.items() if other == visitor]
        for path in _oldest(own[::-1], *EACH):
            del self._files[visitor, path]
            if not any(other == path for _, other in self._files):
                Path(path).unlink(missing_ok=True)
        for forgotten in list(self._files)[: -ALL[0]]:
            del self._files[forgotten]


def _cookie(scope: Scope) -> str:
    return f"visitor-{scope['server'][1]}"  # a host may have pages at several ports, but has one set of cookies


def _oldest(files: list[tuple], most: int, most_bytes: int) -> list:
    """Return the names of `files`, (name, bytes) with the latest first, that exceed the limits."""
    num_kept, total = 0, 0
    for _, size in files:
        total += size
        if num_kept == most or total > most_bytes:
            break
        num_kept += 1
    return [name for name, _ in files[num_kept:]]


def _remove_oldest(folder: Path, most: int, most_bytes: int) -> None:
    """Remove the oldest files beyond the limits, including those that interrupted uploads left behind."""
    files = []
    for path in folder.rglob("*"):
        # meanwhile, an upload that ends may move the file, and another upload may remove it
        with suppress(FileNotFoundError):
            status = path.stat()
            if S_ISREG(status.st_mode):
                files.append((status.st_mtime, path, status.st_size))
    files.sort(reverse=True)
    for path in _oldest([(path, size) for _, path, size in files], most, most_bytes):
        path.unlink(missing_ok=True)
