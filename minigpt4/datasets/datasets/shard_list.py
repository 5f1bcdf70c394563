"""The list of tar shards that a `storage` refers to, and checks of them before training."""

import glob
import math
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
from minigpt4.datasets.datasets.remote import check_urls
from minigpt4.datasets.datasets.tar_members import check_archive

TAR_NAMES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ACCEPTED = "local files, http(s) URLs, or addresses of an object store: s3://, gs://, hf://"
MAX_SHARDS = 1_000_000  # per pattern
LOOKED_AT = 500  # shards that `check_shards` opens at most
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def expand_shards(location: str | Iterable[str]) -> list[str]:
    """Return the shards that `location` refers to: a path or pattern, or a list of these, with `~` and `$VARIABLES`.

    A file stands for itself, a folder for all tars below it. Braces and globs are expanded only in paths that do not
    exist literally; globs without a match give nothing. Raises ValueError for anything but ACCEPTED.
    """
    shards = []
    is_single = isinstance(location, (str, Mapping)) or not hasattr(location, "__iter__")
    patterns = [location] if is_single else location
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern.strip():
            raise ValueError(f"{pattern!r} is no path of a shard; expected text")
        shards += _addresses(pattern) if is_address(pattern) else _paths(pattern)
    return shards


def is_address(shard: str) -> bool:
    """Return whether a shard is remote: a URL or an address of an object store."""
    return is_url(shard) or is_object(shard)


def missing_shards(shards: Sequence[str]) -> list[str]:
    """Return the local shards that are not existing files."""
    return [shard for shard in shards if not is_address(shard) and not os.path.isfile(shard)]


def check_shards(shards: Sequence[str], storage: object) -> None:
    """Raise ValueError if local shards are missing or do not begin as tars; of many, at most LOOKED_AT are opened.

    The first shard of each object store and of each host is requested. `storage` is only for messages.
    """
    if missing := missing_shards(shards):
        found = _what_is_at(missing[0])
        first = f" (first missing: {missing[0]})" + (f"; there is {found}" if found else "")
        if len(missing) < len(shards):
            raise ValueError(f"{len(missing)} of {len(shards)} shards are missing{first}")
        raise ValueError(f"no file matches '{storage}'{first}")
    if not shards:
        raise ValueError(f"no file matches '{storage}'")

    check_objects([shard for shard in shards if is_object(shard)])
    check_urls([shard for shard in shards if is_url(shard)])
    local = [shard for shard in shards if not is_address(shard)]
    opened = local[:: max(1, math.ceil(len(local) / LOOKED_AT))]  # evenly spaced
    faults = []
    for shard in opened:
        try:
            with open_file(shard) as file:
                check_archive(file)
        except (OSError, ReadError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            faults.append(f"'{shard}': {reason}")
    if faults:
        number = f"{len(faults)} of {len(opened)} shards" if len(opened) > 1 else "the shard"
        raise ValueError(f"{number} cannot be read: {faults[0]}")


def open_file(path: str) -> BinaryIO:
    """Open a local shard. Raises OSError, also for anything but a regular file: opening a FIFO would block."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"it is {_what_is_at(path)}, no file")
    return open(path, "rb")


def _addresses(pattern: str) -> Iterator[str]:
    """Yield the shards of a pattern of addresses; webdataset separates several by `::`. Raises ValueError."""
    schemes = "|".join(("https?", *PACKAGES))
    for address in re.split(rf"::(?=(?:{schemes})://)", pattern):
        parsed, example = urlparse(address), "s3://bucket" if is_object(address) else "https://host"
        if not parsed.netloc:
            part = example.partition("://")[2]
            raise ValueError(f"'{address}' names no {part}; write {example}/path.tar")
        shards = _expand_braces(address)
        is_named = is_url(address) or all(shard.endswith(TAR_NAMES) for shard in shards)
        if not is_named or "*" in parsed.path:
            kinds = "object stores" if is_object(address) else "web servers"
            raise ValueError(
                f"'{address}': {kinds} are not searched; name the tar files, as {example}/{{00000..00099}}.tar"
            )
        yield from shards


def _paths(pattern: str) -> Iterator[str]:
    """Yield the shards of a pattern of local paths, also several separated by `::`. Raises ValueError."""
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
        folder = os.path.dirname(part)  # the leading folders that exist are taken literally
        while folder and not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        for name in _expand_braces(part[len(folder) :].lstrip("/")):
            matches = [os.path.join(folder, name)]
            if glob.has_magic(name) and not os.path.exists(matches[0]):
                matches = glob.glob(os.path.join(glob.escape(folder), name), recursive=True)
            for match in sorted(matches):
                yield from _files(match)


def _expand_braces(pattern: str) -> list[str]:
    """Return all expansions of `{00000..00099}` and `{a,b}`. Raises ValueError if there are too many."""
    if "{" not in pattern:  # braceexpand would remove backslashes
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
    """Return all tars below a folder, each once even if links lead to it; else, or if there are none, the path."""
    if not os.path.isdir(path):
        return [path]
    tars = [os.path.join(path, name) for name in list_files(path, TAR_NAMES, follow_out=True)]
    return tars or [path]


def _what_is_at(path: str) -> str:
    """Return, for messages, what is at a path that is not a regular file; "" if there is nothing."""
    try:
        kind = _KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "")
    except OSError:
        return "a link that leads nowhere" if os.path.islink(path) else ""
    if kind != "a folder":
        return kind
    names = sorted(os.listdir(path))
    return f"a folder without {' '.join(TAR_NAMES)} (it has {', '.join(names[:3]) or 'nothing'})"
