"""What every request to the page meets first: who may ask for what, how much and how often.

gradio by itself answers any Host, Origin and X-Forwarded-Host, takes bodies of any size, and serves much that this page
has no use for. What is not allowed here does not reach it.
"""

import ipaddress
import os
import re
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt4.serving.limits import Refusal, Streams, Tries, discard, network_of, whole
from minigpt4.serving.uploads import Uploads

API = "/gradio_api/"
# what the page and gradio_client ask for
NAMES = {
    "/",
    "/config",
    "/login",
    "/logout",
    "/theme.css",
    "/favicon.ico",
    "/manifest.json",
    "/robots.txt",
}
NAMES |= {
    f"{API}{name}"
    for name in ("call/chat", "cancel", "info", "login_check", "queue/data", "queue/join", "reset")
}
NAMES |= {
    f"{API}{name}"
    for name in ("run/predict", "startup-events", "theme.css", "upload", "upload_progress")
}
FOLDERS = ("/assets/", "/static/", f"{API}call/chat/", f"{API}file=", f"{API}heartbeat/")

FORWARDED = (b"x-forwarded-host", b"x-gradio-server")  # gradio would build its links of them
SAFE = {
    # scripts, images and the rest come from here; no other page may frame this one
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
}


class Hosts:
    """The names under which this server may be addressed.

    A page of somebody else whose name is made to point here (DNS rebinding) is in the reader's browser, and so
    inside any firewall; but it has to give its own name. An address as such cannot be anybody else's.
    """

    def __init__(self, server_name: str):
        name = server_name.strip("[]").lower()
        self.is_open = name in ("0.0.0.0", "::")  # it answers at any address of this machine
        self.names = {"localhost", name, *_addresses(name)}
        if not any(map(_is_loopback, self.names - {"localhost"})):
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        self.public = set()  # a proxy in front may have a name of its own for this server
        self.add(os.environ.get("GRADIO_ROOT_PATH"))

    def add(self, url: str | None) -> None:
        """Allow the host of a public address of this page, if it is a whole one."""
        if name := urlsplit(url or "").hostname:
            self.public.add(name)

    def check(self, headers: Headers) -> None:
        """Raises Refusal unless the one Host is this server, and Origin, if there is one, the same."""
        hosts, origin = headers.getlist("host"), headers.get("origin")
        parts = re.fullmatch(
            r"(?:\[([0-9a-f:.]+)\]|([a-z0-9_.-]+))(?::\d{1,5})?", "".join(hosts).lower(), re.ASCII
        )
        if len(hosts) != 1 or not parts or not self._is_own(parts[1] or parts[2]):
            advice = "start it with --server-name, or behind a proxy with GRADIO_ROOT_PATH=https://ITS.NAME"
            raise Refusal(421, f"this server is not called {', '.join(hosts)[:100]!r}: {advice}")
        if origin is not None and origin.lower().partition("://")[2] != hosts[0].lower():
            name = re.fullmatch(r"https?://([a-z0-9_.-]+)(?::\d{1,5})?", origin.lower(), re.ASCII)
            if not name or name[1] not in self.public:
                raise Refusal(403, "what other pages ask is not answered")

    def _is_own(self, name: str) -> bool:
        return (
            name in self.names | self.public
            or _is_loopback(name)
            or (self.is_open and _is_address(name))
        )


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _is_loopback(name: str) -> bool:
    return _is_address(name) and ipaddress.ip_address(name).is_loopback


def _addresses(name: str) -> set[str]:
    try:
        return {found[4][0] for found in socket.getaddrinfo(name, None)}
    except OSError:
        return set()


class Guard:
    """ASGI middleware; the page reads `streams` and adds to `hosts`."""

    def __init__(self, app: ASGIApp, hosts: Hosts, uploads: Uploads, streams: Streams):
        self.app, self.hosts = app, hosts
        self.uploads, self.streams = uploads, streams
        self.tries = Tries()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with a refusal."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None  # gradio has no other
        try:
            await self._pass(scope, receive, send)
        except Refusal as refusal:
            # what of the body is still to come is not read
            response = PlainTextResponse(
                str(refusal), refusal.status, {**SAFE, "connection": "close"}
            )
            await response(scope, receive, send)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        visitor = self.uploads.visitor(scope, headers)
        try:
            send = self._admitted(scope, headers, visitor, send)
        except Refusal:
            await discard(receive, headers)
            raise
        scope["headers"] = [pair for pair in scope["headers"] if pair[0] not in FORWARDED]
        if path == f"{API}upload":
            async with self.uploads.room(headers):
                return await self.app(scope, receive, self.uploads.noted(visitor, send))
        receive = await whole(receive, headers)
        with self.streams.opened(scope):
            await self.app(scope, receive, self.uploads.introduced(scope, visitor, send))

    def _admitted(self, scope: Scope, headers: Headers, visitor: str, send: Send) -> Send:
        """Return the `send` of a request whose body may be read. Raises Refusal."""
        path = scope["path"]
        self.hosts.check(headers)
        if path not in NAMES and not path.startswith(FOLDERS):
            raise Refusal(404, "there is nothing here")
        if path.startswith(f"{API}file="):
            self.uploads.check(visitor, path.removeprefix(f"{API}file="))
        is_login = path == "/login" and scope["method"] == "POST"
        return self._counted(scope, _safe(send)) if is_login else _safe(send)

    def _counted(self, scope: Scope, send: Send) -> Send:
        attempt = self.tries.begin(network_of(scope))

        async def forgiving(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                self.tries.forgive(attempt)
            await send(message)

        return forgiving


def _safe(send: Send) -> Send:
    """Return `send` that adds the headers of SAFE."""

    async def safe(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(SAFE)
        await send(message)

    return safe
