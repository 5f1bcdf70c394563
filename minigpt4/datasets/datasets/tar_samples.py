"""Groups the members of a tar into samples: those whose names are equal up to the last dot.

    0001.jpg 0001.json                            the sample 0001
    photo.00001.jpg photo.00001.txt               the sample photo.00001
    0001.jpg 0001.json 0001.mask.png 0001.npy     the sample 0001; the mask and the .npy are left out

The members of a sample need not be adjacent: within limits, a sample without its image or caption waits for it.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from tarfile import ReadError

from minigpt4.common.image_files import IMAGE_SUFFIXES
from minigpt4.datasets.datasets.tar_archive import BehindTheEndError
from minigpt4.datasets.datasets.tar_members import MAX_MEMBER, Member

IMAGE_EXTENSIONS = tuple(suffix[1:] for suffix in IMAGE_SUFFIXES)
CAPTION_EXTENSIONS = ("json", "txt")
MAX_WAITING = 64 << 20  # bytes of waiting samples; beyond that, the oldest is yielded incomplete
OVERHEAD = 1000  # bytes of memory that a sample takes beside its members


@dataclass
class TarSample:
    """The members of one key. `members`: extension -> bytes of images and captions; `extensions`: all that exist."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    extensions: dict[str, str] = field(default_factory=dict)  # -> why it is not read, or ""

    def size(self) -> int:
        """Return the number of bytes of its members."""
        return sum(map(len, self.members.values()))

    def is_pair(self) -> bool:
        """Return whether it has an image and a caption."""
        return all(
            self.members.keys() & set(kinds) for kinds in (IMAGE_EXTENSIONS, CAPTION_EXTENSIONS)
        )

    def found(self) -> tuple[str, ...]:
        """Return a description of each member, for messages."""
        found = [
            f"{name} ({fault})" if fault else name
            for name, fault in sorted(self.extensions.items())
        ]
        if "." in self.key.rpartition("/")[2] and not self.is_pair():
            found.append("alone: a sample's members have one name up to the last dot")
        return tuple(found)


def tar_samples(members: Iterable[Member]) -> Iterator[TarSample]:
    """Yield the samples of one archive, each once: pairs as soon as they are complete, incomplete samples later.

    Raises a ReadError of `members` after the samples before it; that of the last member may be incomplete and is dropped.
    """
    grouping, key = _Grouping(), None
    try:
        for member in members:
            if not _is_meta(member.name):
                key, extension = split_name(member.name)
                yield from grouping.add(key, extension, member)
    except ReadError as error:
        if not isinstance(error, BehindTheEndError):
            grouping.drop(key)
        yield from grouping.rest()
        raise
    yield from grouping.rest()


def split_name(name: str) -> tuple[str, str]:
    """Return (key, extension): the path up to the last dot, and what follows it in lower case.

    Accents are normalised to NFC, so that names written by macOS (NFD) match those of other systems.
    """
    name = unicodedata.normalize("NFC", name)
    if "." not in name.rpartition("/")[2]:
        return name, "no extension"
    key, extension = name.rsplit(".", 1)
    return key, extension.lower()


class _Grouping:
    """Collects members into samples, which wait here while more of their members may follow."""

    def __init__(self) -> None:
        self.waiting: dict[str, TarSample] = {}
        self.pairs: list[str] = []  # keys of waiting samples that have an image and a caption
        self.yielded_pairs: set[str] = set()  # their keys
        self.num_bytes = 0  # in memory

    def add(self, key: str, extension: str, member: Member) -> Iterator[TarSample]:
        """Add a member; yield the samples that are now complete, or that no longer fit in memory."""
        # a pair is complete once a member of an unrelated name follows
        unrelated = [
            pair for pair in self.pairs if not _is_below(pair, key) and not _is_below(key, pair)
        ]
        for pair in unrelated:
            yield from self._release(pair)
        # an extension that the sample already has starts another sample with the same key
        if key in self.waiting and extension in self.waiting[key].extensions:
            yield from self._release(key)

        if key not in self.waiting:
            self.num_bytes += OVERHEAD + len(key)
        sample = self.waiting.setdefault(key, TarSample(key))
        data, sample.extensions[extension] = member.data, member.fault
        if data is not None and sample.size() + len(data) > MAX_MEMBER:
            data = None
            sample.extensions[extension] = f"too large: a sample has at most {MAX_MEMBER:,} bytes"
        if data is not None:
            sample.members[extension] = data
            self.num_bytes += len(data)
        if sample.is_pair() and key not in self.pairs:
            self.pairs.append(key)
        while self.num_bytes > MAX_WAITING and len(self.waiting) > 1:
            yield from self._release(next(iter(self.waiting)))

    def drop(self, key: str | None) -> None:
        """Discard the waiting sample of this key, if there is one."""
        self.waiting.pop(key, None)
        self.pairs = [pair for pair in self.pairs if pair != key]

    def rest(self) -> Iterator[TarSample]:
        """Yield the waiting samples: pairs first, so that members with a pair's name and more can be left out."""
        incomplete = [key for key in self.waiting if key not in self.pairs]
        for key in [*self.pairs, *incomplete]:
            yield from self._release(key)

    def _release(self, key: str) -> Iterator[TarSample]:
        """Remove a waiting sample and yield it, unless it is an extra of a pair, as 0001.mask of 0001."""
        sample = self.waiting.pop(key)
        self.num_bytes -= OVERHEAD + len(key) + sample.size()
        dots = re.finditer(r"\.(?=[^/]*$)", key)  # those in the file's name
        if key in self.pairs:
            self.pairs.remove(key)
            self.yielded_pairs.add(key)
        elif any(key[: dot.start()] in self.yielded_pairs for dot in dots):
            return
        yield sample


def _is_below(key: str, other: str) -> bool:
    """Return whether `key` is `other`, or `other` extended by a dot and more, in the same folder."""
    return f"{key}.".startswith(f"{other}.") and "/" not in key[len(other) :]


def _is_meta(name: str) -> bool:
    """Return whether a member is not data: added by macOS or webdataset (`__name__`), or a hidden file of another type."""
    path = name.split("/")
    endings = IMAGE_EXTENSIONS + CAPTION_EXTENSIONS
    is_hidden = path[-1].startswith(".") and not path[-1].lower().endswith(endings)
    is_dunder = path[0].startswith("__") and path[0].endswith("__")
    return is_hidden or is_dunder or path[-1].startswith("._") or "__MACOSX" in path
