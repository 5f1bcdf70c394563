"""Files behind http(s) addresses, read as they come: through curl, which knows proxies, passwords and redirects."""

import io
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import PIPE, Popen
from typing import BinaryIO

STALL_S = 30  # without a byte: the transfer is given up
MIN_RATE = 1000  # bytes a second that must come, counted over STALL_S of waiting; at less, no image comes in a step
WAITS_S = (1, 3, 9)  # before it is tried again, where not one byte has come
_CURL = ("curl", "--globoff", "--no-buffer", "--fail", "--silent", "--show-error", "--location")
_CURL += ("--connect-timeout", str(STALL_S), "--speed-limit", "1", "--speed-time", str(STALL_S))
_FINAL = r"error: 4(?!08|29)|onnect to|timed out|too slow"  # another try would find the same
_CLOSED_BY_US = 23  # curl's exit code when nobody reads on: a tar ends before its padding does


@contextmanager
def open_url(url: str) -> Iterator[BinaryIO]:
    """Give a binary stream of what is behind `url`.

    Raises OSError with curl's words, on opening or, for a transfer that was cut, on closing: they
    go before an error of who reads, which is then only a consequence.
    """
    for wait in (*WAITS_S, None):
        with Popen([*_CURL, url], stdout=PIPE, stderr=PIPE, bufsize=0) as curl:
            paced = _Paced(curl.stdout)
            stream = io.BufferedReader(paced)
            error, has_begun = None, bool(stream.peek(1))
            if has_begun:
                try:
                    yield stream
                except Exception as found:
                    error = found
                except BaseException:  # nobody wants the rest
                    curl.kill()
                    raise
            if paced.fault:
                curl.kill()
            curl.stdout.close()
            said = paced.fault or curl.stderr.read().decode(errors="replace").strip()
        if curl.returncode not in (0, _CLOSED_BY_US):
            error = OSError(said or f"curl ended with exit code {curl.returncode}")
        if error is None:
            return
        if has_begun or wait is None or re.search(_FINAL, said):
            raise error
        time.sleep(wait)


class _Paced(io.RawIOBase):
    """What comes through a pipe. Raises OSError, and keeps it as `fault`, if that is too little for the time waited.

    The time in which nobody asks for more does not count.
    """

    def __init__(self, pipe: io.RawIOBase):
        self._pipe, self.fault = pipe, ""
        self._came, self._waited = 0, 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        begin = time.monotonic()
        size = self._pipe.readinto(buffer)
        # the first byte has its own limit
        self._waited += time.monotonic() - begin if self._came else 0
        self._came += size
        if self._waited > STALL_S:
            if size and self._came < MIN_RATE * self._waited:
                self.fault = (
                    f"too slow: {self._came:,} bytes came in {self._waited:.0f} s of waiting"
                )
                raise OSError(self.fault)
            self._came, self._waited = 1, 0.0
        return size
