"""Streams files from http(s) URLs through curl, which supports proxies, passwords and redirects."""

import io
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from subprocess import PIPE, Popen
from typing import BinaryIO
from urllib.parse import urlparse

from minigpt4.common.utils import without_secrets

STALL_S = 30  # seconds without a byte after which a transfer is aborted
MIN_RATE = 1000  # bytes per second, averaged over STALL_S of waiting; a slower transfer is aborted
WAITS_S = (1, 3, 9)  # seconds before each retry; once a byte has arrived, nothing is retried
_CURL = ("curl", "--globoff", "--no-buffer", "--fail", "--silent", "--show-error", "--location")
_CURL += ("--connect-timeout", str(STALL_S), "--speed-limit", "1", "--speed-time", str(STALL_S))
_REFUSED = r"error: 4(?!08|29)"
_FINAL = rf"{_REFUSED}|onnect to|timed out|too slow"  # errors that are not retried
_CLOSED_BY_US = 23  # curl's exit code if the reader stops early, as at a tar's end mark


def check_urls(urls: Sequence[str]) -> None:
    """Request the first URL of each host. Raises ValueError if a host refuses it, and without curl.

    Other errors, such as a host that does not answer now, are left to the run, which counts failed shards.
    """
    if urls and not shutil.which("curl"):
        raise ValueError(f"'{urls[0]}' is read by the program curl, which is not here; install it")
    first_of_host = {urlparse(url).netloc: url for url in reversed(urls)}
    for url in first_of_host.values():
        try:
            with open_url(url, waits_s=()):
                pass
        except OSError as error:
            if re.search(_REFUSED, str(error)):
                raise ValueError(f"'{without_secrets(url)}': {error}") from error


@contextmanager
def open_url(url: str, waits_s: Sequence[float] | None = None) -> Iterator[BinaryIO]:
    """Open `url` as a binary stream; `waits_s`: seconds before each retry, by default WAITS_S.

    Raises OSError with curl's message: on entering the context, or, if the transfer breaks off, on leaving it. It then
    replaces the error of the reader, which is only a consequence.
    """
    for wait in (*(WAITS_S if waits_s is None else waits_s), None):
        with Popen([*_CURL, url], stdout=PIPE, stderr=PIPE, bufsize=0) as curl:
            reader = _MinRateReader(curl.stdout)
            stream = io.BufferedReader(reader)
            error = None
            is_open = bool(stream.peek(1)) or curl.wait() == 0  # the latter: an empty file
            if is_open:
                try:
                    yield stream
                except Exception as reader_error:
                    error = reader_error
                except BaseException:  # such as GeneratorExit: the rest will not be read
                    curl.kill()
                    raise
            if reader.fault:
                curl.kill()
            curl.stdout.close()
            message = reader.fault or curl.stderr.read().decode(errors="replace").strip()
        if curl.returncode not in (0, _CLOSED_BY_US):
            error = OSError(message or f"curl ended with exit code {curl.returncode}")
        if error is None:
            return
        # once the caller has the stream, it cannot be restarted
        if is_open or wait is None or re.search(_FINAL, message):
            raise error
        time.sleep(wait)


class _MinRateReader(io.RawIOBase):
    """Reads a pipe. Raises OSError, and sets `fault` to its message, if data arrives at less than MIN_RATE.

    Only the time spent waiting for data counts, not the time between reads.
    """

    def __init__(self, pipe: io.RawIOBase):
        self._pipe, self.fault = pipe, ""
        self._num_bytes, self._waited = 0, 0.0  # in the current period of STALL_S seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        start = time.monotonic()
        size = self._pipe.readinto(buffer)
        if self._num_bytes:  # the wait for the first byte has curl's own limit
            self._waited += time.monotonic() - start
        self._num_bytes += size
        if self._waited > STALL_S:
            if size and self._num_bytes < MIN_RATE * self._waited:
                self.fault = (
                    f"too slow: {self._num_bytes:,} bytes came in {self._waited:.0f} s of waiting"
                )
                raise OSError(self.fault)
            self._num_bytes, self._waited = 1, 0.0  # 0 would mean: before the first byte
        return size
