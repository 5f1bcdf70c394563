"""Members of a tar become samples: those whose names are equal up to the last dot.

    0001.jpg 0001.json                            the sample 0001
    photo.00001.jpg photo.00001.txt               the sample photo.00001
    0001.jpg 0001.json 0001.mask.png 0001.npy     the sample 0001; what else bears its name is not read

The members of a sample need not be neighbours, within limits: a sample without its image or caption waits for it.
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
MAX_WAITING = 64 << 20  # bytes of samples that wait; then the oldest is given out as it is
OVERHEAD = 1000  # bytes of memory of a sample whose members are not read


@dataclass
class TarSample:
    """`members`: extension -> bytes of images and captions; `extensions`: all that were there, with what is wrong."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    extensions: dict[str, str] = field(default_factory=dict)  # -> why it is not read

    def size(self) -> int:
        """Return the number of bytes of its members."""
        return sum(map(len, self.members.values()))

    def is_pair(self) -> bool:
        """Return whether it has an image and a caption."""
        return all(
            self.members.keys() & set(kinds) for kinds in (IMAGE_EXTENSIONS, CAPTION_EXTENSIONS)
        )

    def found(self) -> tuple[str, ...]:
        """Return what messages say of the members."""
        found = [
            f"{name} ({fault})" if fault else name
            for name, fault in sorted(self.extensions.items())
        ]
        if "." in self.key.rpartition("/")[2] and not self.is_pair():
            found.append("alone: a sample's members have one name up to the last dot")
        return tuple(found)


def tar_samples(members: Iterable[Member]) -> Iterator[TarSample]:
    """Yield the samples of one archive: pairs as they are complete, what stayed alone later, each once.

    Raises ReadError as `members` does, after the samples before; that of the last member is given up.
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
    """Return (what stands before the last dot of a file's name, folders included; the extension, in lower case).

    Accents are as most systems write them (NFC), so that names from macOS (NFD) meet those from elsewhere.
    """
    name = unicodedata.normalize("NFC", name)
    if "." not in name.rpartition("/")[2]:
        return name, "no extension"
    key, extension = name.rsplit(".", 1)
    return key, extension.lower()


class _Grouping:
    """Samples of which members may be to come: `waiting`, and among them `pairs`."""

    def __init__(self) -> None:
        self.waiting: dict[str, TarSample] = {}
        self.pairs: list[str] = []  # keys of those that wait only for more members of their name
        self.given: set[str] = set()  # keys of pairs given out
        self.bytes = 0

    def add(self, key: str, extension: str, member: Member) -> Iterator[TarSample]:
        """Take a member; yield the samples that are complete now, or for which there is no more room."""
        for other in [
            pair for pair in self.pairs if not _is_below(pair, key) and not _is_below(key, pair)
        ]:
            yield from self._give(other)
        # another sample of this name begins
        if key in self.waiting and extension in self.waiting[key].extensions:
            yield from self._give(key)

        if key not in self.waiting:
            self.bytes += OVERHEAD + len(key)
        sample = self.waiting.setdefault(key, TarSample(key))
        data, sample.extensions[extension] = member.data, member.fault
        if data is not None and sample.size() + len(data) > MAX_MEMBER:
            data = None
            sample.extensions[extension] = f"too large: a sample has at most {MAX_MEMBER:,} bytes"
        if data is not None:
            sample.members[extension] = data
            self.bytes += len(data)
        if sample.is_pair() and key not in self.pairs:
            self.pairs.append(key)

        while self.bytes > MAX_WAITING and len(self.waiting) > 1:
            yield from self._give(next(iter(self.waiting)))

    def drop(self, key: str | None) -> None:
        """Forget a sample that waits, if there is one of this key."""
        self.waiting.pop(key, None)
        self.pairs = [pair for pair in self.pairs if pair != key]

    def rest(self) -> Iterator[TarSample]:
        """Yield what waits: pairs first, for what else bears a pair's name is no sample."""
        for key in [*self.pairs, *(key for key in self.waiting if key not in self.pairs)]:
            yield from self._give(key)

    def _give(self, key: str) -> Iterator[TarSample]:
        sample = self.waiting.pop(key)
        self.bytes -= OVERHEAD + len(key) + sample.size()
        if key in self.pairs:
            self.pairs.remove(key)
            self.given.add(key)
        elif any(key[: dot.start()] in self.given for dot in re.finditer(r"\.(?=[^/]*$)", key)):
            return  # it belongs to that pair
        yield sample


def _is_below(key: str, other: str) -> bool:
    """Return whether a key is `other`, or `other` with more behind a dot, in the same folder."""
    return f"{key}.".startswith(f"{other}.") and "/" not in key[len(other) :]


def _is_meta(name: str) -> bool:
    """Return whether a member is no data: what macOS or webdataset (`__name__`) adds, a hidden file of another kind."""
    first, base = name.split("/")[0], name.rpartition("/")[2]
    is_hidden = base.startswith(".") and not base.lower().endswith(
        IMAGE_EXTENSIONS + CAPTION_EXTENSIONS
    )
    is_marked = first.startswith("__") and first.endswith("__")
    return is_hidden or is_marked or base.startswith("._") or "__MACOSX" in name.split("/")
