"""Reads the members of a tar archive in one pass and in bounded memory; any damage is an error.

Python's tarfile silently treats a damaged header, or a file truncated between two members, as the end of the
archive. Here an archive ends with two blocks of zeros, or with a ReadError.
"""

import tarfile
from collections.abc import Collection, Iterator
from tarfile import ReadError, TarInfo
from typing import BinaryIO, NamedTuple

from minigpt4.datasets.datasets.tar_archive import BLOCK, Archive, parsed

# bytes of a member that is read; an image of the maximum number of pixels has fewer
MAX_MEMBER = 64 << 20
MAX_HEADER = 64 << 10  # bytes of a long name, or of a member's pax records
MAX_NAME = 4096  # characters, folders included; no file system allows more
_EXTENSION_HEADERS = (  # these describe the member after them
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_TYPES_WITHOUT_DATA = {  # no content follows these, whatever size their header has
    tarfile.LNKTYPE: "a link",
    tarfile.SYMTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a FIFO",
    tarfile.DIRTYPE: "a folder",
}


class Member(NamedTuple):
    """A file in an archive. `data` is None if it was not read; `fault` says why, if it was to be read."""

    name: str
    data: bytes | None
    fault: str = ""


def tar_members(file: BinaryIO, endings: Collection[str]) -> Iterator[Member]:
    """Yield the members of a tar except folders; only those whose names have one of the `endings` are read.

    The tar is plain, or compressed by gzip, bzip2 or xz; concatenated archives are read as one. Bytes of a name that
    are not UTF-8 become `\\xNN`. Raises ReadError if the file is damaged, not a tar, or has an impossible size.
    """
    archive = Archive(file)
    extended = {}  # pax records, and a long name as "path", of the member that follows
    while block := archive.header():
        start = archive.position - BLOCK
        info = parsed(block, start)
        if info.type in (*_EXTENSION_HEADERS, tarfile.XGLTYPE):
            if info.size > MAX_HEADER:
                raise ReadError(
                    f"a header of {info.size:,} bytes at byte {start:,}; at most {MAX_HEADER:,}"
                )
            content = archive.padded(info.size)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                extended["path"] = content.partition(b"\0")[0]
            elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                extended |= _pax_records(content, start)
            continue
        yield from _member(archive, block, info, extended, tuple(endings))
        extended = {}
    if extended:
        raise ReadError(f"the member is missing behind its header that ends at byte {start:,}")


def check_archive(file: BinaryIO) -> None:
    """Raise ReadError if a file does not begin as a tar that can be read here."""
    if block := Archive(file).header():
        parsed(block, 0)


def _member(
    archive: Archive, block: bytes, info: TarInfo, extended: dict, endings: tuple
) -> Iterator[Member]:
    """Yield the member of a header block, unless it is a folder, and move the archive past its content."""
    is_sparse = info.type == tarfile.GNUTYPE_SPARSE or any(
        key.startswith("GNU.sparse") for key in extended
    )
    name = extended.get("GNU.sparse.name", extended.get("path"))
    name = info.name if name is None else name.decode("utf-8", "backslashreplace")
    if len(name) > MAX_NAME:
        raise ReadError(
            f"a name of {len(name):,} characters before byte {archive.position:,}; at most {MAX_NAME:,}"
        )
    size = _number(extended["size"], archive.position) if "size" in extended else info.size
    # a sparse file: these bytes of the header, and of each block with a list of its holes, say that another one follows
    has_more_holes = info.type == tarfile.GNUTYPE_SPARSE and block[482]
    while has_more_holes:
        has_more_holes = archive.read(BLOCK)[504]
    if kind := _TYPES_WITHOUT_DATA.get(info.type):
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
    """Return {keyword: value} of a pax header; each record is `<its length> <keyword>=<value>\\n`. Raises ReadError."""
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
