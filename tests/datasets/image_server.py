"""A web server on loopback that fails as the real web does: images are missing, cut off, no images, slow, refused."""

import io
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

PATIENCE_S = 2  # the downloader's --timeout in the test
SLOW_S, STUCK_S = 0.5, 3 * PATIENCE_S
# kind -> number of URLs
FAULTS = {"gone": 20, "cut": 10, "page": 10, "slow": 6, "stuck": 4, "refused": 4}
USABLE = {"jpeg", "png", "slow"}


def kinds(number):
    """Return the kinds of `number` URLs: alternately JPEG and PNG, with the FAULTS spread evenly among them."""
    result = [("jpeg", "png")[place % 2] for place in range(number)]
    faults = list(Counter(FAULTS).elements())
    for place, fault in zip(range(0, number, number // len(faults)), faults, strict=False):
        result[place] = fault
    return result


def drawn(number, form):
    """Return the bytes of an image whose size and colour depend on `number`."""
    size = (40 + number % 50, 40 + number % 31)
    pixels = np.full(
        (size[1], size[0], 3), np.random.default_rng(number).integers(0, 256, 3), dtype=np.uint8
    )
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers /<kind>/<number> according to the kind."""

    def do_GET(self):
        self.server.asked[self.path] += 1
        _, kind, number = self.path.split("/")
        if kind == "gone":
            return self.send_error(404)
        body = (
            b"<html>moved</html>"
            if kind == "page"
            else drawn(int(number), "PNG" if kind == "png" else "JPEG")
        )
        time.sleep({"slow": SLOW_S, "stuck": STUCK_S}.get(kind, 0))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if kind == "refused":
            self.send_header("X-Robots-Tag", "noai")
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if kind == "cut" else body)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 256  # more than the downloader's threads
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Print nothing: clients that hang up are part of the test."""


@contextmanager
def serving():
    """Context of a running server; `address` is its URL and `asked` counts requests by path."""
    with Server(("127.0.0.1", 0), Handler) as server:
        server.asked, server.address = Counter(), f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
