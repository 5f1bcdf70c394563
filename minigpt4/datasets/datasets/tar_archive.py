"""The bytes of a tar archive in order, unpacked, header by header, up to an end that is one."""

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Callable
from tarfile import ReadError, TarInfo
from typing import BinaryIO

from minigpt4.common.utils import LFS_POINTER

BLOCK = tarfile.BLOCKSIZE
# bytes of zeros at an archive's end: the mark, and padding to 10,240
MAX_END = tarfile.RECORDSIZE + 2 * BLOCK
# of unpacked to packed bytes, once so many are unpacked; images have 1 to 2
MAX_RATIO, RATIO_FROM = 100, 64 << 20
_UNPACK = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
_OTHER_FORMATS = {
    LFS_POINTER.encode(): "a Git LFS pointer, not the data (install git-lfs, then: git lfs pull)",
    b"PAR1": "a parquet file (download again with img2dataset --output_format webdataset)",
    b"\x28\xb5\x2f\xfd": "packed by zstd (unpack it: zstd -d)",
    b"PK\x03\x04": "a zip archive (write its files into a tar)",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive (write its files into a tar)",
    b"<": "a web page or XML (the download went wrong)",
    b"{": "JSON, perhaps an index of shards or an error (name the tar files themselves)",
    b"[": "JSON, perhaps an index of shards (name the tar files themselves)",
}


class BehindTheEndError(ReadError):
    """An archive was read to its end, and what follows it is no archive."""


class Archive:
    """The bytes of an archive in order, unpacked; `position` counts them."""

    def __init__(self, file: BinaryIO):
        self.position = self._begin = 0
        self._end = file.seek(0, 2) if file.seekable() else None
        if file.seekable():
            file.seek(0)
        self._packed = _Counted(file)
        unpack = _unpacking(self._packed.head)
        self._file = unpack(self._packed) if unpack else self._packed
        if unpack:
            self._end = None

    def header(self) -> bytes | None:
        """Return the next header, None at the end: two blocks of zeros, padding of zeros, nothing behind them.

        Behind them another archive may follow, as `cat a.tar b.tar` writes it.
        """
        start, zeros = self.position, 0
        while (block := self._read(BLOCK)) and not any(block) and zeros <= MAX_END:
            zeros += len(block)
        end = start + zeros
        is_padded = (end - self._begin) % tarfile.RECORDSIZE == 0 and 2 * BLOCK < zeros < MAX_END
        is_end = zeros == 2 * BLOCK or is_padded
        # everything but another member, or the end as tar writes it, is damage
        if not block and zeros < 2 * BLOCK:
            raise ReadError(
                f"unexpected end of data at byte {end:,}: an archive's end mark is missing"
            )
        if block and not zeros and len(block) < BLOCK:
            raise ReadError(f"unexpected end of data at byte {self.position:,}")
        if block and zeros and not is_end and zeros <= MAX_END:
            raise ReadError(
                f"damaged at byte {start:,}: {zeros:,} bytes of zeros in place of a member"
            )
        if zeros and not is_end:
            raise BehindTheEndError(
                f"zeros from byte {start:,} on, more than a tar ends with: not written to its end?"
            )
        if block and zeros:
            _check_another(block, end)
            self._begin = end
        return block or None

    def padded(self, size: int) -> bytes:
        """Return `size` bytes; their padding to whole blocks is passed over."""
        data = self.read(size)
        self.skip(-size % BLOCK)
        return data

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes. Raises ReadError if there are fewer."""
        self._check_end(size)
        data = self._read(size)
        if len(data) < size:
            raise ReadError(f"unexpected end of data at byte {self.position:,}")
        return data

    def skip(self, size: int) -> None:
        """Pass over bytes: a file's without reading them, a stream's in pieces."""
        if self._end is None:
            for begin in range(0, size, 1 << 20):
                self.read(min(1 << 20, size - begin))
        else:
            self._check_end(size)
            self._packed.file.seek(size, 1)
            self.position += size

    def _check_end(self, size: int) -> None:
        """Raise ReadError if a file, whose end is known, has fewer than `size` bytes left."""
        if self._end is not None and self.position + size > self._end:
            raise ReadError(
                f"unexpected end of data: {size:,} bytes should stand at byte {self.position:,}"
            )

    def _read(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except Exception as error:  # each way of packing has errors of its own
            raise ReadError(f"{type(error).__name__} at byte {self.position:,}: {error}") from error
        self.position += len(data)
        most = max(RATIO_FROM, MAX_RATIO * self._packed.taken)
        if self._file is not self._packed and self.position > most:
            raise ReadError(
                f"unpacks to more than {MAX_RATIO} times its own size (byte {self.position:,})"
            )
        return data


def _unpacking(head: bytes) -> Callable[[BinaryIO], BinaryIO] | None:
    """Return what unpacks a file that begins with this block, None for a plain tar. Raises ReadError."""
    try:
        if head.strip(b"\0"):
            parsed(head, 0)
    except ReadError:
        for magic, unpack in _UNPACK.items():
            if head.startswith(magic):
                return unpack
        text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
        for magic, what in _OTHER_FORMATS.items():
            if text.startswith(magic):
                raise ReadError(f"{what}; expected a tar archive") from None
        raise
    if not head:
        raise ReadError("an empty file; expected a tar archive")
    return None


class _Counted:
    """A file whose first block, `head`, can be seen before it is read; counts the bytes taken."""

    def __init__(self, file: BinaryIO):
        self.file, self.taken = file, 0
        self.head = file.read(BLOCK)
        self._unread = self.head

    def read(self, size: int) -> bytes:
        data, self._unread = self._unread[:size], self._unread[size:]
        if len(data) < size:
            data += self.file.read(size - len(data))
        self.taken += len(data)
        return data


def parsed(block: bytes, start: int) -> TarInfo:
    """Return what the header at byte `start` says. Raises ReadError."""
    try:
        info = TarInfo.frombuf(block, "utf-8", "backslashreplace")
        if info.size < 0:
            raise ValueError(f"a size of {info.size:,}")
    except (tarfile.HeaderError, ValueError) as error:
        where = f"damaged at byte {start:,}" if start else "no tar archive"
        raise ReadError(f"{where}: {error}") from None
    return info


def _check_another(block: bytes, start: int) -> None:
    """Raise BehindTheEndError if a block behind an archive is not the first of another one."""
    try:
        parsed(block, start)
    except ReadError as error:
        raise BehindTheEndError(f"something else behind the archive's end: {error}") from None
