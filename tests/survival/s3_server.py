"""A real S3 server (moto's) on loopback, whose buckets fail in one known way each."""

import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from urllib.request import Request, urlopen

PACKAGES = ("s3fs", "moto", "werkzeug")  # pip install s3fs "moto[server]"
MISSING = ", ".join(name for name in PACKAGES if importlib.util.find_spec(name) is None)
REASON = f"needs {MISSING}: make object-stores runs these tests"
BUCKETS = ("good", "404", "503", "busy", "cut", "cut-twice")
SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


class Faults:
    """moto's WSGI application, but: `503` is busy always, `busy` twice; `cut` sends half, `cut-twice` only so often."""

    def __init__(self, moto):
        self.moto, self.asked = moto, Counter()

    def __call__(self, environ, start_response):
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        kind, is_object = path.split("/")[1], path.count("/") > 1
        if method == "PUT" or not is_object:
            return self.moto(environ, start_response)
        self.asked[path, method] += 1
        if kind == "503" or (kind == "busy" and self.asked[path, method] <= 2):
            start_response(
                "503 Slow Down",
                [("Content-Type", "text/xml"), ("Content-Length", str(len(SLOW_DOWN)))],
            )
            return [SLOW_DOWN] if method == "GET" else []
        body = self.moto(environ, start_response)
        is_cut = kind == "cut" or (kind == "cut-twice" and self.asked[path, method] <= 2)
        return half(b"".join(body)) if is_cut and method == "GET" else body


def half(body: bytes) -> Iterator[bytes]:
    """Yield half of a body; the server then closes the connection, before the length that it promised."""
    yield body[: len(body) // 2]
    raise ConnectionAbortedError("cut")


@contextmanager
def s3_server() -> Iterator[str]:
    """Context of a running server with empty BUCKETS; gives its address. The environment leads every client there."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, *_):
            """Write no line for each request."""

    application = Faults(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    server.daemon_threads, server.block_on_close = True, False
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    settings = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "to-ken",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        for bucket in BUCKETS:
            put(address, bucket, b"")
        yield address
    finally:
        server.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def put(address: str, name: str, content: bytes | Path) -> str:
    """Make a bucket, or store an object `bucket/key`; return its s3:// address."""
    data = content.read_bytes() if isinstance(content, Path) else content
    headers = {"Content-Type": "application/octet-stream"}
    with urlopen(Request(f"{address}/{name}", data, headers, method="PUT")):
        return f"s3://{name}"
