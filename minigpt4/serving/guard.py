"""Middleware in front of gradio, which checks every request to the page: its host, path, size and rate.

gradio by itself answers any Host, Origin and X-Forwarded-Host, takes bodies of any size, and serves many paths that the
page does not use. What is not allowed here does not reach it.
"""

import ipaddress
import re
import socket

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt4.serving.limits import Body, Refusal, Streams, Tries, network_of
from minigpt4.serving.uploads import Uploads

API = "/gradio_api/"
# the paths that the page and gradio_client ask for
PATHS = {"/", "/config", "/login", "/logout", "/theme.css"}
PATHS |= {"/favicon.ico", "/manifest.json", "/robots.txt"}
PATHS |= {
    f"{API}{name}"
    for name in ("call/chat", "cancel", "info", "login_check", "queue/data", "queue/join", "reset")
}
PATHS |= {
    f"{API}{name}"
    for name in ("run/predict", "startup-events", "theme.css", "upload", "upload_progress")
}
PATH_PREFIXES = ("/assets/", "/static/", f"{API}call/chat/", f"{API}file=", f"{API}heartbeat/")

_HOST = r"(?:\[([0-9a-f:.]+)\]|([a-z0-9_.-]+))(?::\d{1,5})?"
# what to do if a name is refused
ADVICE = "start it with --server-name, or behind a proxy with GRADIO_ROOT_PATH=https://ITS.NAME"

# headers that gradio would build its links from
LINK_HEADERS = (b"x-forwarded-host", b"x-gradio-server")
SECURITY_HEADERS = {
    # scripts, images and the rest come from this server; no other site may frame the page
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
}


class Hosts:
    """The host names by which this server may be addressed.

    This stops DNS rebinding: another site's page, whose name has been made to point here, runs in the visitor's browser
    and so behind any firewall, but its requests give its own name. An IP address cannot be another site's.
    """

    def __init__(self, server_name: str, advice: str = ADVICE):
        name, self.advice = server_name.strip("[]").lower(), advice
        self.is_open = name in ("0.0.0.0", "::")  # it listens on all of this machine's addresses
        self.names = {"localhost", name, *_addresses(name)}
        self.is_local = any(map(_is_loopback, self.names - {"localhost"}))
        if not self.is_local:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        self.public = set()  # names of a reverse proxy in front

    def add(self, url: str) -> None:
        """Allow the host of a URL of this server; `url` may also be the host alone. Raises ValueError without a host."""
        host = re.fullmatch(rf"(?:https?://)?{_HOST}(?:[/?#].*)?", url.lower(), re.ASCII)
        if not host:
            raise ValueError(
                f"{url!r} is no name or URL of this server: expected ITS.NAME or https://ITS.NAME"
            )
        self.public.add(host[1] or host[2])

    def add_root(self, root: str) -> None:
        """Allow the host of GRADIO_ROOT_PATH, which may be a path alone. Raises ValueError, without the value."""
        if root.startswith("/"):
            return
        try:
            self.add(root)
        except ValueError:  # its message shows a password in the URL
            raise ValueError("GRADIO_ROOT_PATH: expected https://ITS.NAME, or a path") from None

    def check(self, headers: Headers) -> None:
        """Raise Refusal unless the only Host is this server, and Origin, if given, is the same or a public name."""
        hosts, origin = headers.getlist("host"), headers.get("origin")
        host = re.fullmatch(_HOST, "".join(hosts).lower(), re.ASCII)
        if len(hosts) != 1 or not host or not self._is_own(host[1] or host[2]):
            name = ", ".join(hosts)[:100]
            raise Refusal(421, f"this server is not called {name!r}: {self.advice}")
        if origin is not None and origin.lower().partition("://")[2] != hosts[0].lower():
            name = re.fullmatch(r"https?://([a-z0-9_.-]+)(?::\d{1,5})?", origin.lower(), re.ASCII)
            if not name or name[1] not in self.public:
                raise Refusal(403, "requests from pages of other sites are not answered")

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
            return None  # gradio uses no other type
        body = Body(receive, Headers(scope=scope))
        try:
            await self._check_and_pass(scope, body, send)
        except Refusal as refusal:
            await body.discard()
            # the connection is closed, since there may be more of the body
            response = PlainTextResponse(
                str(refusal), refusal.status, {**SECURITY_HEADERS, "connection": "close"}
            )
            await response(scope, receive, send)

    async def _check_and_pass(self, scope: Scope, body: Body, send: Send) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        visitor = self.uploads.visitor(scope, headers)
        send = self._admit(scope, headers, visitor, send)
        scope["headers"] = [pair for pair in scope["headers"] if pair[0] not in LINK_HEADERS]
        # an upload is passed on piece by piece; any other body is read first, within its limits
        if path == f"{API}upload":
            async with self.uploads.room(headers):
                return await self.app(scope, body, self.uploads.recording(visitor, send))
        receive = await body.read()
        with self.streams.opened(scope):
            await self.app(scope, receive, self.uploads.setting_cookie(scope, visitor, send))

    def _admit(self, scope: Scope, headers: Headers, visitor: str, send: Send) -> Send:
        """Return the `send` to use for a request whose body may be read. Raises Refusal."""
        path = scope["path"]
        self.hosts.check(headers)
        if path not in PATHS and not path.startswith(PATH_PREFIXES):
            raise Refusal(404, "there is nothing here")
        if path.startswith(f"{API}file="):
            self.uploads.check(visitor, path.removeprefix(f"{API}file="))
        is_login = path == "/login" and scope["method"] == "POST"
        send = _adding_security_headers(send)
        return self._counting_login(scope, send) if is_login else send

    def _counting_login(self, scope: Scope, send: Send) -> Send:
        """Count an attempt to log in; return a `send` that takes it back when gradio accepts the password."""
        attempt = self.tries.begin(network_of(scope))

        async def send_and_forgive(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                self.tries.forgive(attempt)
            await send(message)

        return send_and_forgive


def _adding_security_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(SECURITY_HEADERS)
        await send(message)

    return send_with_headers
