"""A web server on loopback that gives a shard, or fails to in one known way."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from tests.survival.damage import good, write_tar


class Handler(BaseHTTPRequestHandler):
    """/<kind>/<name> answers as the kind says; `busy` is so twice."""

    def do_GET(self) -> None:
        """Answer, or fail to."""
        kind = self.path.split("/")[1]
        asked = self.server.asked[self.path] = self.server.asked[self.path] + 1
        if kind == "silent":
            return time.sleep(self.server.patience_s)
        if kind in ("404", "503") or (kind == "busy" and asked <= 2):
            return self.send_error(404 if kind == "404" else 503)
        body = b"<!DOCTYPE html><html>Log in</html>" * 99 if kind == "page" else self.server.tar
        body = b"" if kind == "empty" else body
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind == "trickle":
            return self.trickle(body)
        self.wfile.write(body[: len(body) // 2] if kind in ("cut", "stalls") else body)
        self.wfile.flush()
        if kind == "stalls":
            time.sleep(self.server.patience_s)

    def trickle(self, body: bytes) -> None:
        """Send two bytes at a time."""
        for place in range(0, len(body), 2):
            self.wfile.write(body[place : place + 2])
            self.wfile.flush()
            time.sleep(0.2)

    def log_message(self, *_) -> None:
        """Write no line for each request."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    patience_s = 120

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: that the client has hung up is meant."""


@contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """Context of a running server on loopback; gives its address."""
    with Server(("127.0.0.1", 0), Handler) as server:
        tar = write_tar(
            folder / "web.tar", {f"{number:06}": good(number) for number in range(100, 104)}
        )
        server.tar, server.asked = tar.read_bytes(), Counter()
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
