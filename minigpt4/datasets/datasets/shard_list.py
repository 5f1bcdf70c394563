"""Which tar shards a `storage` names, and whether they can be some, as far as can be seen before anything is read."""

import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from tarfile import ReadError
from typing import BinaryIO
from urllib.parse import urlparse

from braceexpand import braceexpand

from minigpt4.common.image_files import WINDOWS_PATH, list_files
from minigpt4.common.utils import expand_path, is_url
from minigpt4.datasets.datasets.object_store import PACKAGES, check_objects, is_object
from minigpt4.datasets.datasets.tar_members import check_archive

TAR_NAMES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ACCEPTED = "local files, http(s) URLs, or addresses of an object store: s3://, gs://, hf://"
MAX_SHARDS = 1_000_000  # of a pattern
LOOKED_AT = 500  # shards whose beginning is read by `check_shards`
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def expand_shards(location: str | Iterable[str]) -> list[str]:
    """Return the shards that `location` names: text or a list of texts, with `~` and `$VARIABLES`.

    A file is itself, a folder all tars below it; braces and globs are looked for only in what is not there as it
    stands. Globs that match nothing are left out. Raises ValueError for anything but ACCEPTED.
    """
    shards = []
    is_one = isinstance(location, (str, Mapping)) or not hasattr(location, "__iter__")
    for pattern in [location] if is_one else location:
        if not isinstance(pattern, str) or not pattern.strip():
            raise ValueError(f"{pattern!r} is no path of a shard; expected text")
        shards += _addresses(pattern) if is_address(pattern) else _paths(pattern)
    return shards


def is_address(shard: str) -> bool:
    """Return whether a shard is none of this machine."""
    return is_url(shard) or is_object(shard)


def missing_shards(shards: Sequence[str]) -> list[str]:
    """Return those of a list of shards that are local and no file."""
    return [shard for shard in shards if not is_address(shard) and not os.path.isfile(shard)]


def check_shards(shards: Sequence[str], storage: object) -> None:
    """Raise ValueError where local shards of `storage` are missing, or do not begin as tars; of many some are read.

    Of an object store the first shard is asked for.
    """
    if missing := missing_shards(shards):
        what = _what_is_at(missing[0])
        first = f" (first missing: {missing[0]})" + (f"; there is {what}" if what else "")
        if len(missing) < len(shards):
            raise ValueError(f"{len(missing)} of {len(shards)} shards are missing{first}")
        raise ValueError(f"no file matches '{storage}'{first}")
    if not shards:
        raise ValueError(f"no file matches '{storage}'")

    check_objects([shard for shard in shards if is_object(shard)])
    local = [shard for shard in shards if not is_address(shard)]
    looked_at = local[:: -(-len(local) // LOOKED_AT)] if local else []
    faults = []
    for shard in looked_at:
        try:
            with open_file(shard) as file:
                check_archive(file)
        except (OSError, ReadError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            faults.append(f"'{shard}': {reason}")
    if faults:
        number = f"{len(faults)} of {len(looked_at)} shards" if len(looked_at) > 1 else "the shard"
        raise ValueError(f"{number} cannot be read: {faults[0]}")


def open_file(path: str) -> BinaryIO:
    """Open a local shard. Raises OSError, also for what is there and no file: a FIFO would be waited for."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"it is {_what_is_at(path)}, no file")
    return open(path, "rb")


def _addresses(pattern: str) -> Iterator[str]:
    schemes = "|".join(("https?", *PACKAGES))
    # webdataset's way to write a list
    for address in re.split(rf"::(?=(?:{schemes})://)", pattern):
        if not urlparse(address).netloc:
            what, example = (
                ("bucket", "s3://bucket") if is_object(address) else ("host", "https://host")
            )
            raise ValueError(f"'{address}' names no {what}; write {example}/path.tar")
        shards = _braces(address)
        if is_object(address) and not all(
            shard.endswith(TAR_NAMES) and "*" not in shard for shard in shards
        ):
            example = "s3://bucket/{00000..00099}.tar"
            raise ValueError(
                f"'{address}': object stores are not searched; name the tar files, as {example}"
            )
        yield from shards


def _paths(pattern: str) -> Iterator[str]:
    path = str(expand_path(pattern))
    if os.path.exists(path):
        yield from _files(path)
        return
    if WINDOWS_PATH.match(pattern):
        raise ValueError(
            f"'{pattern}' is an absolute path of Windows; write it as this machine knows it"
        )
    if scheme := urlparse(pattern).scheme:
        raise ValueError(f"'{pattern}': '{scheme}:' is refused; shards are {ACCEPTED}")
    for part in path.split("::"):
        folder = os.path.dirname(part)  # the folders that are there as they stand
        while folder and not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        for name in _braces(part[len(folder) :].lstrip("/")):
            path = os.path.join(folder, name)
            is_pattern = glob.has_magic(name) and not os.path.exists(path)
            found = (
                glob.glob(os.path.join(glob.escape(folder), name), recursive=True)
                if is_pattern
                else [path]
            )
            for each in sorted(found):
                yield from _files(each)


def _braces(pattern: str) -> list[str]:
    """Return what `{00000..00099}` and `{a,b}` stand for. Raises ValueError."""
    if "{" not in pattern:  # braceexpand takes backslashes away
        return [pattern]
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)
    try:
        is_long = any(abs(int(last) - int(first)) >= MAX_SHARDS for first, last in ranges)
        expanded = [] if is_long else list(islice(braceexpand(pattern), MAX_SHARDS + 1))
    except ValueError as error:
        raise ValueError(f"'{pattern}': {error}; write ranges as {{00000..00099}}") from error
    if is_long or len(expanded) > MAX_SHARDS:
        raise ValueError(f"'{pattern}': more than {MAX_SHARDS:,} shards")
    return expanded


def _files(path: str) -> list[str]:
    """Return the path of a file; of a folder, all tars below it, each once whatever links lead there."""
    if not os.path.isdir(path):
        return [path]
    return [os.path.join(path, name) for name in list_files(path, TAR_NAMES, follow_out=True)] or [
        path
    ]


def _what_is_at(path: str) -> str:
    """Return what is at a path that is no file, "" for nothing."""
    try:
        kind = _KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "")
    except OSError:
        return "a link that leads nowhere" if os.path.islink(path) else ""
    if kind != "a folder":
        return kind
    names = sorted(os.listdir(path))
    return f"a folder without {' '.join(TAR_NAMES)} (it has {', '.join(names[:3]) or 'nothing'})"
