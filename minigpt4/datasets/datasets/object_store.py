"""Files of object stores (`s3://`, `gs://`, `hf://`) as streams: block by block through fsspec and the store's package.

Credentials and endpoints are found as these packages find them: `AWS_PROFILE`, `AWS_ENDPOINT_URL`, ..
"""

import io
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO
from urllib.parse import urlparse

# scheme -> what fsspec needs for it
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
BLOCK = 8 << 20  # bytes of a request
WAITS_S = (1, 3, 9)  # before a block is asked for again, beside what the package itself tries
STALL_S = 10  # without a byte; s3fs then tries again, five times in all
_OPTIONS = {
    "s3": {
        "config_kwargs": {
            "connect_timeout": STALL_S,
            "read_timeout": STALL_S,
            "retries": {"max_attempts": 0},
        }
    }
}
# another try would find the same
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError, ImportError)
_REFUSED = r"(?i)credentials|forbidden|unauthorized|anonymous caller"


def is_object(path: str) -> bool:
    """Return whether a path is an address of an object store."""
    return urlparse(str(path)).scheme in PACKAGES


def check_objects(addresses: Sequence[str]) -> None:
    """Raise ValueError where a package is missing, or the store refuses the first of some addresses or lacks it.

    A store that does not answer now is left to the run, which counts what does not come.
    """
    for scheme in sorted({urlparse(address).scheme for address in addresses}):
        first = next(address for address in addresses if urlparse(address).scheme == scheme)
        try:
            _store(first).info(first)
        except Exception as error:
            if _is_final(error):
                words = (
                    error
                    if isinstance(error, ValueError)
                    else f"'{first}': {type(error).__name__}: {error}"
                )
                raise ValueError(str(words)) from error


@contextmanager
def open_object(address: str) -> Iterator[BinaryIO]:
    """Give a binary stream of an object.

    A block that does not come is asked for again, so that a connection that was cut loses nothing. Raises the error of
    the last try, of whatever kind the package has; ValueError, in words, if there is no such package.
    """
    store = _store(address)
    size = _tried(lambda: store.info(address))["size"]
    with io.BufferedReader(_Blocks(store, address, size)) as stream:
        yield stream


class _Blocks(io.RawIOBase):
    """An object of `size` bytes, of which one block is held."""

    def __init__(self, store: Any, address: str, size: int):
        self._store, self._address = store, address
        self._size = size
        # where in the object the rest of the block begins
        self._begin = 0
        self._block = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        if not self._block and self._begin < self._size:
            end = min(self._begin + BLOCK, self._size)
            self._block = memoryview(_tried(lambda: self._part(end)))
        size = min(len(buffer), len(self._block))
        buffer[:size], self._block = self._block[:size], self._block[size:]
        self._begin += size
        return size

    def _part(self, end: int) -> bytes:
        data = self._store.cat_file(self._address, start=self._begin, end=end)
        if len(data) != end - self._begin:
            raise OSError(
                f"{len(data):,} bytes came from byte {self._begin:,} on, not {end - self._begin:,}"
            )
        return data


def _store(address: str) -> Any:
    """Return fsspec's file system of an address. Raises ValueError if its package is missing."""
    import fsspec

    scheme = urlparse(address).scheme
    try:
        return fsspec.filesystem(scheme, **_OPTIONS.get(scheme, {}))
    except ImportError as error:
        package = PACKAGES[scheme]
        raise ValueError(
            f"'{address}' needs the package {package} ({error}): pip install {package}"
        ) from error


def _tried(read: Callable[[], Any]) -> Any:
    for wait in WAITS_S:
        try:
            return read()
        except Exception as error:  # each package has errors of its own
            if _is_final(error):
                raise
            time.sleep(wait)
    return read()


def _is_final(error: Exception) -> bool:
    return isinstance(error, _FINAL) or re.search(_REFUSED, str(error)) is not None
