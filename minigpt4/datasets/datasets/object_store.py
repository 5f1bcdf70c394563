"""Streams files from object stores (`s3://`, `gs://`, `hf://`), block by block, through fsspec and the store's package.

These packages find credentials and endpoints in their usual places: `AWS_PROFILE`, `AWS_ENDPOINT_URL`, ..
"""

import io
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO
from urllib.parse import urlparse

# scheme -> package that fsspec needs for it
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
BLOCK = 8 << 20  # bytes per request
WAITS_S = (1, 3, 9)  # seconds before each retry of a block, besides the package's own retries
STALL_S = 10  # seconds without a byte after which s3fs retries; it makes five attempts
_OPTIONS = {
    "s3": {
        "config_kwargs": {
            "connect_timeout": STALL_S,
            "read_timeout": STALL_S,
            "retries": {"max_attempts": 0},
        }
    }
}
# errors that are not retried: these types, and messages of refused access
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError, ImportError)
_REFUSED = r"(?i)credentials|forbidden|unauthorized|anonymous caller"


def is_object(path: str) -> bool:
    """Return whether a path is an address of an object store."""
    return urlparse(str(path)).scheme in PACKAGES


def check_objects(addresses: Sequence[str]) -> None:
    """Check the first address of each scheme. Raises ValueError if its package, permission or file is missing.

    Other errors, such as a store that does not answer now, are left to the run, which counts failed shards.
    """
    for scheme in sorted({urlparse(address).scheme for address in addresses}):
        first = next(address for address in addresses if urlparse(address).scheme == scheme)
        try:
            _store(first).info(first)
        except Exception as error:
            if _is_final(error):
                message = f"'{first}': {type(error).__name__}: {error}"
                if isinstance(error, ValueError):
                    message = str(error)
                raise ValueError(message) from error


@contextmanager
def open_object(address: str) -> Iterator[BinaryIO]:
    """Open an object as a binary stream.

    Each block is retried by itself, so a lost connection loses no data. Raises the error of the last attempt, of
    whatever type the package has, or ValueError if the package is missing.
    """
    store = _store(address)
    size = _with_retries(lambda: store.info(address))["size"]
    with io.BufferedReader(_BlockReader(store, address, size)) as stream:
        yield stream


class _BlockReader(io.RawIOBase):
    """Reads an object of `size` bytes in requests of BLOCK bytes."""

    def __init__(self, store: Any, address: str, size: int):
        self._store, self._address = store, address
        self._size = size
        self._position = 0  # in the object
        self._block = memoryview(b"")  # bytes that were fetched but not read yet

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        if not self._block and self._position < self._size:
            end = min(self._position + BLOCK, self._size)
            self._block = memoryview(_with_retries(lambda: self._fetch(end)))
        size = min(len(buffer), len(self._block))
        buffer[:size], self._block = self._block[:size], self._block[size:]
        self._position += size
        return size

    def _fetch(self, end: int) -> bytes:
        data = self._store.cat_file(self._address, start=self._position, end=end)
        size = end - self._position
        if len(data) != size:
            raise OSError(f"{len(data):,} bytes came from byte {self._position:,} on, not {size:,}")
        return data


def _store(address: str) -> Any:
    """Return fsspec's file system for an address. Raises ValueError if its package is missing."""
    import fsspec

    scheme = urlparse(address).scheme
    try:
        return fsspec.filesystem(scheme, **_OPTIONS.get(scheme, {}))
    except ImportError as error:
        package = PACKAGES[scheme]
        raise ValueError(
            f"'{address}' needs the package {package} ({error}): pip install {package}"
        ) from error


def _with_retries(read: Callable[[], Any]) -> Any:
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
