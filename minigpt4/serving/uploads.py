"""The files that visitors upload: whose they are, and never more than there is room for."""

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

EACH = (200, 400 * 2**20)  # files and bytes of one visitor; the oldest make room for the new
ALL = (2_000, 2 * 2**30)  # of all visitors
MOST_BYTES = 170 * 2**20  # of one request: eight images of 20 MB


class Uploads:
    """The files in `folder`, which is the page's alone. Everybody may see those of `public`.

    A visitor is a browser, known by a cookie, or else an address.
    """

    def __init__(self, folder: str | Path, public: Iterable[str]):
        self.folder, self.public = Path(folder), set(public)
        self._files = {}  # (visitor, path) -> bytes, the latest last
        self._running = 0  # bytes of the uploads that are under way

    def visitor(self, scope: Scope, headers: Headers) -> str:
        """Return who asks."""
        cookie = re.search(
            rf"(?:^|; ?){_cookie(scope)}=([\w-]{{22}})(?:;|$)", headers.get("cookie", ""), re.ASCII
        )
        return cookie[1] if cookie else network_of(scope)

    def introduced(self, scope: Scope, visitor: str, send: Send) -> Send:
        """Return a `send` that gives the page's visitor a cookie, unless it has one."""
        if scope["path"] != "/" or visitor != network_of(scope):
            return send

        async def introducing(message: Message) -> None:
            if message["type"] == "http.response.start":
                cookie = (
                    f"{_cookie(scope)}={secrets.token_urlsafe(16)}; Path=/; HttpOnly; SameSite=Lax"
                )
                MutableHeaders(scope=message).append("set-cookie", cookie)
            await send(message)

        return introducing

    def check(self, visitor: str, path: str) -> None:
        """Raise Refusal for a file that is not the visitor's own."""
        if path not in self.public and (visitor, path) not in self._files:
            raise Refusal(404, "there is no such image, or no longer")

    @asynccontextmanager
    async def room(self, headers: Headers) -> AsyncIterator[None]:
        """Make room for the upload that a request announces. Raises Refusal for too large a one."""
        length = int(headers.get("content-length", -1))
        if length < 0:
            raise Refusal(411, "an upload has to say its length")
        if length > MOST_BYTES or self._running + length > ALL[1]:
            raise Refusal(413, f"too much at once: at most {MOST_BYTES:,} bytes in one upload")
        self._running += length
        try:
            await asyncio.to_thread(_remove_oldest, self.folder, ALL[0], ALL[1] - self._running)
            yield
        finally:
            self._running -= length

    def noted(self, visitor: str, send: Send) -> Send:
        """Return a `send` that notes the files which gradio's answer to an upload names."""
        answer = {"status": 0, "body": b""}

        async def noting(message: Message) -> None:
            answer["status"] = message.get("status", answer["status"])
            answer["body"] += message.get("body", b"")
            if (
                message["type"] == "http.response.body"
                and not message.get("more_body")
                and answer["status"] == 200
            ):
                self._note(visitor, json.loads(answer["body"]))
            await send(message)

        return noting

    def _note(self, visitor: str, paths: list[str]) -> None:
        for path in paths:
            self._files.pop((visitor, path), None)
            with suppress(FileNotFoundError):  # others needed the room
                self._files[visitor, path] = Path(path).stat().st_size
        own = [(path, size) for (other, path), size in self._files.items() if other == visitor]
        for path in _oldest(own[::-1], *EACH):
            del self._files[visitor, path]
            if not any(other == path for _, other in self._files):
                Path(path).unlink(missing_ok=True)
        for forgotten in list(self._files)[: -ALL[0]]:
            del self._files[forgotten]


def _cookie(scope: Scope) -> str:
    return f"visitor-{scope['server'][1]}"  # one machine may have several pages


def _oldest(files: list[tuple], most: int, most_bytes: int) -> list:
    """Return the names among (name, bytes), the latest first, that are too many."""
    held, total = 0, 0
    for _, size in files:
        total += size
        if held == most or total > most_bytes:
            break
        held += 1
    return [name for name, _ in files[held:]]


def _remove_oldest(folder: Path, most: int, most_bytes: int) -> None:
    """Remove what is too much, whoever left it there; an upload that was broken off leaves a file too."""
    files = []
    for path in folder.rglob("*"):
        # an upload that ends meanwhile moves its file, another one's room may have removed it
        with suppress(FileNotFoundError):
            status = path.stat()
            if S_ISREG(status.st_mode):
                files.append((status.st_mtime, path, status.st_size))
    files.sort(reverse=True)
    for path in _oldest([(path, size) for _, path, size in files], most, most_bytes):
        path.unlink(missing_ok=True)
