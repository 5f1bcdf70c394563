"""Sequential reading of a tar archive, decompressed if needed, up to a valid end of the archive."""

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Callable
from tarfile import ReadError, TarInfo
from typing import BinaryIO

from minigpt4.common.utils import LFS_POINTER

BLOCK = tarfile.BLOCKSIZE
# bytes of zeros at an archive's end: the end mark of two blocks, and padding to a multiple of 10,240 bytes
MAX_END = tarfile.RECORDSIZE + 2 * BLOCK
# highest ratio of decompressed to compressed bytes, checked once RATIO_FROM bytes are decompressed; images have 1 to 2
MAX_RATIO, RATIO_FROM = 100, 64 << 20
_DECOMPRESSORS = {  # first bytes of a file -> what opens it
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
    """An archive was read to its end, but is followed by something that is not an archive."""


class Archive:
    """Reads an archive in order. `position`: the number of decompressed bytes read or skipped so far."""

    def __init__(self, file: BinaryIO):
        self.position = self._archive_start = 0
        self._end = file.seek(0, 2) if file.seekable() else None
        if file.seekable():
            file.seek(0)
        self._raw = _CountingReader(file)
        decompress = _decompressor(self._raw.head)
        self._file = decompress(self._raw) if decompress else self._raw
        if decompress:
            self._end = None

    def header(self) -> bytes | None:
        """Return the next header block, or None at the end. Raises ReadError if the archive is damaged.

        An archive ends with two blocks of zeros, which may be followed by padding of zeros. After that the file may
        continue with another archive, as `cat a.tar b.tar` writes it: its first header is returned.
        """
        start, zeros = self.position, 0
        while (block := self._read(BLOCK)) and not any(block) and zeros <= MAX_END:
            zeros += len(block)
        end = start + zeros
        is_aligned = (end - self._archive_start) % tarfile.RECORDSIZE == 0
        is_padded_end = is_aligned and 2 * BLOCK < zeros < MAX_END
        is_end = zeros == 2 * BLOCK or is_padded_end
        # anything but a header, or an end as tar writes it, is damage
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
            _check_next_archive(block, end)
            self._archive_start = end
        return block or None

    def padded(self, size: int) -> bytes:
        """Return the next `size` bytes, and skip their padding to whole blocks."""
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
        """Skip the next `size` bytes: by seeking in an uncompressed file, else by reading them in pieces."""
        if self._end is None:
            for begin in range(0, size, 1 << 20):
                self.read(min(1 << 20, size - begin))
        else:
            self._check_end(size)
            self._raw.file.seek(size, 1)
            self.position += size

    def _check_end(self, size: int) -> None:
        """Raise ReadError if the end of the file is known and fewer than `size` bytes are left."""
        if self._end is not None and self.position + size > self._end:
            raise ReadError(
                f"unexpected end of data: {size:,} bytes should stand at byte {self.position:,}"
            )

    def _read(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except Exception as error:  # each decompressor has errors of its own
            raise ReadError(f"{type(error).__name__} at byte {self.position:,}: {error}") from error
        self.position += len(data)
        most = max(RATIO_FROM, MAX_RATIO * self._raw.num_read)
        if self._file is not self._raw and self.position > most:
            raise ReadError(
                f"unpacks to more than {MAX_RATIO} times its own size (byte {self.position:,})"
            )
        return data


def _decompressor(head: bytes) -> Callable[[BinaryIO], BinaryIO] | None:
    """Return what decompresses a file with this first block, None for a plain tar. Raises ReadError for other files."""
    try:
        if head.strip(b"\0"):
            parsed(head, 0)
    except ReadError:
        for magic, decompress in _DECOMPRESSORS.items():
            if head.startswith(magic):
                return decompress
        text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
        for magic, description in _OTHER_FORMATS.items():
            if text.startswith(magic):
                raise ReadError(f"{description}; expected a tar archive") from None
        raise
    if not head:
        raise ReadError("an empty file; expected a tar archive")
    return None


class _CountingReader:
    """Counts the bytes read from a file in `num_read`; `head` is its first block, available before reading."""

    def __init__(self, file: BinaryIO):
        self.file, self.num_read = file, 0
        self.head = file.read(BLOCK)
        self._unread = self.head

    def read(self, size: int) -> bytes:
        data, self._unread = self._unread[:size], self._unread[size:]
        if len(data) < size:
            data += self.file.read(size - len(data))
        self.num_read += len(data)
        return data


def parsed(block: bytes, start: int) -> TarInfo:
    """Return the content of a header block, which is at byte `start`. Raises ReadError if it is none."""
    try:
        info = TarInfo.frombuf(block, "utf-8", "backslashreplace")
        if info.size < 0:
            raise ValueError(f"a size of {info.size:,}")
    except (tarfile.HeaderError, ValueError) as error:
        where = f"damaged at byte {start:,}" if start else "no tar archive"
        raise ReadError(f"{where}: {error}") from None
    return info


def _check_next_archive(block: bytes, start: int) -> None:
    """Raise BehindTheEndError if the block after an archive's end is not the first header of another archive."""
    try:
        parsed(block, start)
    except ReadError as error:
        raise BehindTheEndError(f"something else behind the archive's end: {error}") from None
