"""The members of a tar archive in one pass, in bounded memory; damage is an error wherever it is.

Python's tarfile takes a damaged header, or the end of a file that was cut between two members, for the end of the
archive, and says nothing of what is lost. Here an archive ends with two blocks of zeros or with a ReadError.
"""

import bz2
import gzip
import lzma
import tarfile
from collections.abc import Callable, Collection, Iterator
from tarfile import ReadError, TarInfo
from typing import BinaryIO, NamedTuple

from minigpt4.common.utils import LFS_POINTER

BLOCK = tarfile.BLOCKSIZE
MAX_MEMBER = (
    64 << 20
)  # bytes of a member that is read; an image of the most pixels that are taken has less
MAX_HEADER = 64 << 10  # bytes of a long name, or of a member's pax records
MAX_NAME = 4096  # characters, folders included; more no file system takes
MAX_END = (
    tarfile.RECORDSIZE + 2 * BLOCK
)  # bytes of zeros at an archive's end: the mark, and padding to 10,240
MAX_RATIO, RATIO_FROM = (
    100,
    64 << 20,
)  # of unpacked to packed bytes, once so many are unpacked; images have 1 to 2
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
_HEADERS_OF_NEXT = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_NAMES_ONLY = {  # what has no bytes of its own here, whatever its size says
    tarfile.LNKTYPE: "a link",
    tarfile.SYMTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a FIFO",
    tarfile.DIRTYPE: "a folder",
}


class BehindTheEndError(ReadError):
    """An archive was read to its end, and what follows it is no archive."""


class Member(NamedTuple):
    """`data` is None where the member is not read; `fault` says why, if it was wanted."""

    name: str
    data: bytes | None
    fault: str = ""


def tar_members(file: BinaryIO, endings: Collection[str]) -> Iterator[Member]:
    """Yield what is no folder in a tar, plain or packed by gzip, bzip2 or xz; `endings` says what is read.

    A name that is not UTF-8 has `\\xNN` for those bytes. Archives written one behind the other are read as one.
    Raises ReadError for what is damaged, no tar, or lies about its size.
    """
    archive = _Archive(file)
    of_next = {}  # what headers say of the member behind them
    while block := archive.header():
        start = archive.position - BLOCK
        info = _parsed(block, start)
        if info.type in (*_HEADERS_OF_NEXT, tarfile.XGLTYPE):
            if info.size > MAX_HEADER:
                raise ReadError(
                    f"a header of {info.size:,} bytes at byte {start:,}; at most {MAX_HEADER:,}"
                )
            content = archive.padded(info.size)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                of_next["path"] = content.partition(b"\0")[0]
            elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                of_next |= _pax_records(content, start)
            continue
        yield from _member(archive, block, info, of_next, tuple(endings))
        of_next = {}
    if of_next:
        raise ReadError(f"the member is missing behind its header that ends at byte {start:,}")


def check_archive(file: BinaryIO) -> None:
    """Raise ReadError, in words, if a file does not begin as a tar that is read here."""
    if block := _Archive(file).header():
        _parsed(block, 0)


def _member(
    archive: "_Archive", block: bytes, info: TarInfo, of_next: dict, endings: tuple
) -> Iterator[Member]:
    """Yield the member of a header, unless it is a folder, and pass over its bytes."""
    is_sparse = info.type == tarfile.GNUTYPE_SPARSE or any(
        key.startswith("GNU.sparse") for key in of_next
    )
    name = of_next.get("GNU.sparse.name", of_next.get("path"))
    name = info.name if name is None else name.decode("utf-8", "backslashreplace")
    if len(name) > MAX_NAME:
        raise ReadError(
            f"a name of {len(name):,} characters before byte {archive.position:,}; at most {MAX_NAME:,}"
        )
    size = _number(of_next["size"], archive.position) if "size" in of_next else info.size
    is_extended = info.type == tarfile.GNUTYPE_SPARSE and block[482]
    while is_extended:
        is_extended = archive.read(BLOCK)[504]

    if kind := _NAMES_ONLY.get(info.type):
        size = 0
        if kind == "a folder" or name.endswith("/"):
            return
        yield Member(name, None, kind)
    elif not name.lower().endswith(endings):
        yield Member(name, None)
    elif is_sparse:
        yield Member(name, None, "a sparse file")
    elif size > MAX_MEMBER:
        yield Member(name, None, f"{size:,} bytes, at most {MAX_MEMBER:,}")
    else:
        yield Member(name, archive.padded(size))
        return
    archive.skip(size + -size % BLOCK)


class _Archive:
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
        is_end = zeros == 2 * BLOCK or (
            (end - self._begin) % tarfile.RECORDSIZE == 0 and 2 * BLOCK < zeros < MAX_END
        )
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
        if self._end is not None and self.position + size > self._end:
            raise ReadError(
                f"unexpected end of data: {size:,} bytes should stand at byte {self.position:,}"
            )
        data = self._read(size)
        if len(data) < size:
            raise ReadError(f"unexpected end of data at byte {self.position:,}")
        return data

    def skip(self, size: int) -> None:
        """Pass over bytes: a file's without reading them, a stream's in pieces."""
        if self._end is None:
            for begin in range(0, size, 1 << 20):
                self.read(min(1 << 20, size - begin))
        elif self.position + size > self._end:
            raise ReadError(
                f"unexpected end of data: {size:,} bytes should stand at byte {self.position:,}"
            )
        else:
            self._packed.file.seek(size, 1)
            self.position += size

    def _read(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except Exception as error:  # each way of packing has errors of its own
            raise ReadError(f"{type(error).__name__} at byte {self.position:,}: {error}") from error
        self.position += len(data)
        if self._file is not self._packed and self.position > max(
            RATIO_FROM, MAX_RATIO * self._packed.taken
        ):
            raise ReadError(
                f"unpacks to more than {MAX_RATIO} times its own size (byte {self.position:,})"
            )
        return data


def _unpacking(head: bytes) -> Callable[[BinaryIO], BinaryIO] | None:
    """Return what unpacks a file that begins with this block, None for a plain tar. Raises ReadError."""
    try:
        if head.strip(b"\0"):
            _parsed(head, 0)
    except ReadError as error:
        for magic, unpack in _UNPACK.items():
            if head.startswith(magic):
                return unpack
        text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
        what = next(
            (what for magic, what in _OTHER_FORMATS.items() if text.startswith(magic)), None
        )
        raise ReadError(f"{what}; expected a tar archive" if what else str(error)) from None
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


def _parsed(block: bytes, start: int) -> TarInfo:
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
        _parsed(block, start)
    except ReadError as error:
        raise BehindTheEndError(f"something else behind the archive's end: {error}") from None


def _pax_records(content: bytes, start: int) -> dict[str, bytes]:
    """Return {keyword: value} of a pax header, whose records are `<their length> <keyword>=<value>\\n`."""
    records, begin = {}, 0
    while begin < len(content):
        digits = content[begin : begin + 8].partition(b" ")[0]
        end = begin + _number(digits, start)
        record = content[begin + len(digits) + 1 : end]
        if end > len(content) or b"=" not in record or not record.endswith(b"\n"):
            raise ReadError(f"damaged at byte {start:,}: a pax header that cannot be read")
        keyword, value = record[:-1].split(b"=", 1)
        records[keyword.decode("utf-8", "backslashreplace")] = value
        begin = end
    return records


def _number(digits: bytes, start: int) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise ReadError(f"damaged at byte {start:,}: {digits[:20]!r} is no size")
    return int(digits)
