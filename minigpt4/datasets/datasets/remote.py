"""Files behind http(s) addresses, read as they come: through curl, which knows proxies, passwords and redirects."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import PIPE, Popen
from typing import BinaryIO

STALL_S = 30  # without a byte: the transfer is given up
WAITS_S = (1, 3, 9)  # before it is tried again, where not one byte has come
_CURL = ("curl", "--fail", "--silent", "--show-error", "--location", "--connect-timeout", str(STALL_S))
_CURL += ("--speed-limit", "1", "--speed-time", str(STALL_S))
_FINAL = r"error: 4(?!08|29)|onnect to|timed out|too slow"  # another try would find the same
_CLOSED_BY_US = 23  # curl's exit code when nobody reads on: a tar ends before its padding does


@contextmanager
def open_url(url: str) -> Iterator[BinaryIO]:
    """Give a binary stream of what is behind `url`.

    Raises OSError with curl's words, on opening or, for a transfer that was cut, on closing: they
    go before an error of who reads, which is then only a consequence.
    """
    for wait in (*WAITS_S, None):
        with Popen([*_CURL, url], stdout=PIPE, stderr=PIPE) as curl:
            error, has_begun = None, bool(curl.stdout.peek(1))
            if has_begun:
                try:
                    yield curl.stdout
                except Exception as found:
                    error = found
                except BaseException:  # nobody wants the rest
                    curl.kill()
                    raise
            curl.stdout.close()
            said = curl.stderr.read().decode(errors="replace").strip()
        if curl.returncode not in (0, _CLOSED_BY_US):
            error = OSError(said or f"curl ended with exit code {curl.returncode}")
        if error is None:
            return
        if has_begun or wait is None or re.search(_FINAL, said):
            raise error
        time.sleep(wait)
