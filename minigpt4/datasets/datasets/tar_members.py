"""The members of a tar archive in one pass, in bounded memory; damage is an error wherever it is.

Python's tarfile takes a damaged header, or the end of a file that was cut between two members, for the end of the
archive, and says nothing of what is lost. Here an archive ends with two blocks of zeros or with a ReadError.
"""

import tarfile
from collections.abc import Collection, Iterator
from tarfile import ReadError, TarInfo
from typing import BinaryIO, NamedTuple

from minigpt4.datasets.datasets.tar_archive import BLOCK, Archive, parsed

# bytes of a member that is read; an image of the most pixels that are taken has less
MAX_MEMBER = 64 << 20
MAX_HEADER = 64 << 10  # bytes of a long name, or of a member's pax records
MAX_NAME = 4096  # characters, folders included; more no file system takes
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
    archive = Archive(file)
    of_next = {}  # what headers say of the member behind them
    while block := archive.header():
        start = archive.position - BLOCK
        info = parsed(block, start)
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
    if block := Archive(file).header():
        parsed(block, 0)


def _member(
    archive: Archive, block: bytes, info: TarInfo, of_next: dict, endings: tuple
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
    # a sparse file may have blocks of a list of its holes behind its header
    is_extended = info.type == tarfile.GNUTYPE_SPARSE and block[482]
    while is_extended:
        is_extended = archive.read(BLOCK)[504]
    # its bytes, where they are wanted and can be had
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
