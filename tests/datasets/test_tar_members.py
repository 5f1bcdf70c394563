"""Reading the members of a tar, each once and in bounded memory; damage, other formats and sizes are reported."""

import bz2
import gzip
import io
import lzma
import re
import subprocess
import tarfile
import time
import tracemalloc

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minigpt4.datasets.datasets.tar_archive import BehindTheEndError
from minigpt4.datasets.datasets.tar_members import (
    MAX_MEMBER,
    Member,
    ReadError,
    check_archive,
    tar_members,
)

ENDINGS = ("jpg", "txt")


def member(name, data=b"", **fields):
    """Return the bytes of a member in GNU's format with these `fields` in its header."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)


def archive(names, form=tarfile.PAX_FORMAT, mode="w"):
    """Return the bytes of a tar; the content of each member is its name."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=form) as tar:
        for name in names:
            data = name.encode("utf-8", "surrogateescape")
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


class Pipe(io.BytesIO):
    """A file that cannot seek, like a pipe."""

    def seekable(self):
        return False


def walk(content, file=io.BytesIO):
    """Return (the members of an archive, the message of its error or "")."""
    found = []
    try:
        for each in tar_members(file(content), ENDINGS):
            found.append(each)
    except ReadError as error:
        return found, str(error)
    return found, ""


NAMES = [f"{number}.{ending}" for number in range(10) for ending in ENDINGS]
WHOLE = archive(NAMES)
END = bytes(1024)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_every_format_and_compression_is_read(form, pack):
    content = pack(archive(NAMES, form))
    assert (
        walk(content)
        == walk(content, Pipe)
        == ([Member(name, name.encode()) for name in NAMES], "")
    )


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    "name, read_as",
    [
        ("d" * 130 + "/" + "é" * 130 + ".jpg", None),
        ("caf\udce9.jpg", "caf\\xe9.jpg"),
        ("[1] {a}.jpg", None),
        ("<b>.txt", None),
        ("BZh.txt", None),
    ],
)
def test_names_are_read_whatever_they_are(form, name, read_as):
    data = name.encode("utf-8", "surrogateescape")
    assert walk(archive([name], form)) == ([Member(read_as or name, data)], "")


def test_members_without_content_are_named_and_the_rest_is_read():
    special = {
        "link.jpg": (tarfile.LNKTYPE, "a link"),
        "symlink.jpg": (tarfile.SYMTYPE, "a link"),
        "device.jpg": (tarfile.CHRTYPE, "a device"),
        "fifo.jpg": (tarfile.FIFOTYPE, "a FIFO"),
        "folder.jpg": (tarfile.DIRTYPE, None),
    }
    content = b"".join(
        member(name, type=kind, linkname="0.jpg") for name, (kind, _) in special.items()
    )
    expected = [Member(name, None, fault) for name, (_, fault) in special.items() if fault]
    assert walk(content + WHOLE)[0][: len(expected) + 1] == [*expected, Member("0.jpg", b"0.jpg")]


def test_other_members_are_skipped():
    content = member("0.npy", b"n" * 5000) + member("0.jpg", b"j")
    assert walk(content + END) == ([Member("0.npy", None), Member("0.jpg", b"j")], "")


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_sparse_files_are_skipped(tmp_path, form):
    with open(tmp_path / "huge.jpg", "wb") as file:
        for place in range(8):  # more holes than a header has room for
            file.seek((place + 1) << 29)
            file.write(b"x")
    (tmp_path / "behind.txt").write_text("behind")
    tar = ["tar", f"--format={form}", "-cSf", "s.tar", "huge.jpg", "behind.txt"]
    subprocess.run(tar, cwd=tmp_path, check=True)
    content = (tmp_path / "s.tar").read_bytes()
    assert walk(content) == (
        [Member("huge.jpg", None, "a sparse file"), Member("behind.txt", b"behind")],
        "",
    )


def header_at(number):
    """Return the position of the header of a member of WHOLE."""
    return 1024 * number


@pytest.mark.parametrize(
    "damage, message, number",
    [
        (
            lambda c: c[: header_at(6) + 3] + b"!" + c[header_at(6) + 4 :],
            "damaged at byte 6,144: bad checksum",
            6,
        ),
        (
            lambda c: c[: header_at(6)] + bytes(512) + c[header_at(6) + 512 :],
            "512 bytes of zeros in place of",
            6,
        ),
        (
            lambda c: c[: header_at(5)] + bytes(4096) + c[header_at(9) :],
            "4,096 bytes of zeros in place of",
            5,
        ),
        (
            lambda c: c[: header_at(6)],
            "unexpected end of data at byte 6,144: an archive's end mark is missing",
            6,
        ),
        (lambda c: c[: header_at(6)] + bytes(512), "an archive's end mark is missing", 6),
        (
            lambda c: c[: header_at(6)] + bytes(1 << 18),
            "zeros from byte 6,144 on, more than a tar ends with",
            6,
        ),
        (lambda c: c[: header_at(6) + 100], "unexpected end of data at byte 6,244", 6),
        (
            lambda c: c[: header_at(6) + 514],
            "unexpected end of data: 5 bytes should stand at byte 6,656",
            6,
        ),
        (
            lambda c: c + b"\n",
            "something else behind the archive's end: damaged at byte 30,720",
            20,
        ),
        (lambda c: c + bytes(range(256)) * 9, "something else behind the archive's end", 20),
        (lambda c: gzip.compress(c)[:200], "EOFError at byte", None),
        (lambda c: gzip.compress(c)[:-8] + b"12345678", r"BadGzipFile at byte", 20),
        (
            lambda c: c[: header_at(6)] + member("x.jpg", size=5 << 30),
            "5,368,709,120 bytes should stand at",
            6,
        ),
        (
            lambda c: c[: header_at(6)] + member("x.jpg", type=b"L", size=3 << 30),
            "a header of 3,221,225,472 byt",
            6,
        ),
        (
            lambda c: c[: header_at(6)] + member("x.jpg", type=b"x", size=3 << 30),
            "a header of 3,221,225,472 byt",
            6,
        ),
        (
            lambda c: c[: header_at(6)] + member("x", b"9999 path=x.jpg\n", type=b"x") + END,
            "a pax header that",
            6,
        ),
        (
            lambda c: c[: header_at(6)] + member("x", b"14 path=x.jpg\n", type=b"x") + END,
            "the member is missing",
            6,
        ),
        (
            lambda c: c[: header_at(6)] + member("y" * 5000 + ".jpg") + END,
            "a name of 5,004 characters",
            6,
        ),
        (
            lambda c: c[: header_at(6)] + member("x.jpg", size=-512),
            "damaged at byte 6,144: a size of -512",
            6,
        ),
    ],
)
def test_damage_is_reported_with_its_position(damage, message, number):
    content = damage(archive(NAMES, tarfile.USTAR_FORMAT))
    found, error = walk(content)
    assert message in error
    through_a_pipe, error = walk(content, Pipe)
    assert through_a_pipe == found and error
    assert [each.name for each in found if each.name != "x.jpg"] == NAMES[
        : min(20, number or len(found))
    ]


def test_concatenated_archives_are_read_as_one():
    other = archive(["a.jpg"])
    short = member("b.jpg", b"b.jpg") + END  # as written without padding
    for content in (
        WHOLE + other,
        WHOLE + short + other,
        gzip.compress(WHOLE) + gzip.compress(other),
    ):
        found, error = walk(content)
        assert not error and found[0].name == "0.jpg" and found[-1].name == "a.jpg"


def test_data_after_the_end_is_distinguished_from_damage():
    with pytest.raises(BehindTheEndError):
        list(tar_members(io.BytesIO(WHOLE + b"<html>"), ENDINGS))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["bomb.jpg", "bomb.mp4"])
def test_a_decompression_bomb_is_rejected_in_little_time_and_memory(pack, name):
    header = member(name, size=1 << 30)
    bomb = io.BytesIO(pack(header) + pack(bytes(16 << 20)) * 64)
    tracemalloc.start()
    begin = time.process_time()
    try:
        with pytest.raises(ReadError, match="unpacks to more than 100 times its own size"):
            list(tar_members(bomb, ENDINGS))
        assert tracemalloc.get_traced_memory()[1] < MAX_MEMBER
        assert time.process_time() - begin < 5
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "an empty file; expected a tar archive"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
            "a Git LFS pointer, not the data",
        ),
        (b"PAR1" + bytes(90), "a parquet file"),
        (b"\x28\xb5\x2f\xfd" + bytes(90), "packed by zstd"),
        (b"PK\x03\x04" + bytes(90), "a zip archive"),
        (b"\n<!DOCTYPE html>", "a web page"),
        (b'{"__kind__": "wids-shard-index-v1"}', "JSON, perhaps an index of shards"),
        (b"\xff\xd8\xff\xe0" + b"jpeg" * 200, "no tar archive: (invalid header|bad checksum)"),
        (b"text", "no tar archive: truncated header"),
        (gzip.compress(b"no tar" * 99, mtime=0), "no tar archive: (invalid header|bad checksum)"),
    ],
)
def test_a_file_that_is_not_a_tar_is_named(content, message):
    with pytest.raises(ReadError, match=message):
        check_archive(io.BytesIO(content))
    assert re.search(message, walk(content)[1])


def test_a_tar_passes_the_check():
    for content in (WHOLE, gzip.compress(WHOLE), END, archive(["{0}.jpg"])):
        check_archive(io.BytesIO(content))


def damaged(kind, place, size, value):
    """Return WHOLE truncated, or with one byte changed, or with a range of zeros."""
    if kind == "cut":
        return WHOLE[:place]
    piece = bytes([value]) if kind == "byte" else bytes(min(size, len(WHOLE) - place))
    return WHOLE[:place] + piece + WHOLE[place + len(piece) :]


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["cut", "byte", "zeros"]),
    st.integers(0, len(WHOLE) - 1),
    st.integers(1, 5000),
    st.integers(0, 255),
)
def test_a_damaged_tar_is_read_correctly_or_reported(kind, place, size, value):
    # zeros up to a position where a tar's padding may end cannot be distinguished from padding
    assume(kind != "zeros" or (place + size - 1) // 512 % 20 != 19)
    found, error = walk(damaged(kind, place, size, value))
    names = [each.name for each in found]
    lost = [name for name in NAMES if name not in names]
    assert [name for name in NAMES if name not in lost] == names
    # else only a member's content has changed, which has no checksum, or a member of two blocks has become an end mark
    assert error or len(lost) <= 1


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=3000), st.booleans())
def test_any_bytes_after_a_member_are_members_or_an_error(junk, is_packed):
    content = member("0.jpg", b"0") + junk
    found, error = walk(gzip.compress(content) if is_packed else content)
    assert found[0] == Member("0.jpg", b"0")
    assert error or junk.startswith(END)
