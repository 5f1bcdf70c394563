"""A cache of remote shards: a folder of bounded size, shared by all processes of a machine.

A shard is cached while it is read: each byte goes to the reader and to a temporary file of that reader, which is renamed
to the shard's name once it is complete and on disk. Every open file is locked, so unused files are known even if the
process that opened them was killed; the least recently used of these are removed when space is needed. A shard that
cannot be cached (full disk, a shard larger than the limit, another fault of the folder) is still read.
"""

import fcntl
import hashlib
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

STEP = 16 << 20  # at most this many bytes are reserved at a time for a file that is being written
USES = ("shards read from it", "kept in it", "not kept")  # what became of a shard
_FILE_NAME = re.compile(r"[0-9a-f]{32}\.tar|shard-\w+\.partial")  # other files are not the cache's
# called with an index into USES, and the reason if a shard is not kept
OnUse = Callable[[int, str], None]


class ShardCache:
    """A folder whose cached files have at most `max_bytes` together. It is created if it does not exist."""

    def __init__(self, folder: str | Path, max_bytes: int):
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.step = min(STEP, max_bytes // 64)

    @contextmanager
    def opened(
        self, address: str, fetch: Callable[[str], AbstractContextManager], on_use: OnUse
    ) -> Iterator[BinaryIO]:
        """Open a shard as a binary stream: from the cached file, else from `fetch(address)`, caching it meanwhile.

        If the reader of a cached file raises an error, the file is removed, so that the next reader fetches the shard
        again. A fetched shard is kept only if neither its reader nor `fetch` raises an error.
        """
        path = self.folder / f"{hashlib.blake2b(address.encode(), digest_size=16).hexdigest()}.tar"
        if file := self._open_cached(path, on_use):
            on_use(0, "")
            with file:
                try:
                    yield file
                except Exception:
                    path.unlink(missing_ok=True)
                    raise
            return
        copy = None
        try:
            with fetch(address) as stream:
                copy = _CopyingReader(stream, self, on_use)
                yield io.BufferedReader(copy)
                copy.readall()  # what follows the archive's end
            copy.finish(path)
        finally:
            if copy:
                copy.discard()

    def _open_cached(self, path: Path, on_use: OnUse) -> BinaryIO | None:
        """Return the cached file, locked against removal, or None if there is none."""
        try:
            file = open(path, "rb")  # noqa: SIM115
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.utime(file.fileno())  # `grow` removes the files with the oldest times first
            return file
        except (FileNotFoundError, BlockingIOError):  # the latter: it is being removed
            return None
        except OSError as error:
            on_use(2, str(error))
            return None

    def grow(self, file: BinaryIO, size: int) -> None:
        """Enlarge a file of this folder to `size` bytes. Raises OSError if there is no space for it."""
        growth = size - os.fstat(file.fileno()).st_size
        with self.locked():
            files = sorted(self._files(), key=lambda path_and_stat: path_and_stat[1].st_mtime_ns)
            excess = sum(stat.st_size for _, stat in files) + growth - self.max_bytes
            for path, stat in files:
                if excess > 0 and _remove_unused(path):
                    excess -= stat.st_size
            if excess > 0:
                raise OSError(f"no room in {self.max_bytes:,} bytes: what is there is in use")
            file.truncate(size)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from enlarging or renaming cached files, so that their sizes can be summed up."""
        with open(self.folder / ".lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        for entry in os.scandir(self.folder):
            if _FILE_NAME.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    yield entry.path, entry.stat()


class _CopyingReader(io.RawIOBase):
    """Reads `stream`, and writes what was read to a file of `cache` until there is no more space."""

    def __init__(self, stream: BinaryIO, cache: ShardCache, on_use: OnUse):
        self._stream, self._cache = stream, cache
        self._on_use, self._file = on_use, None
        self._size, self._reserved = 0, 0  # bytes
        try:
            cache.folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.NamedTemporaryFile(  # noqa: SIM115
                dir=cache.folder, prefix="shard-", suffix=".partial", delete=False
            )
            fcntl.flock(self._file, fcntl.LOCK_EX)
        except OSError as error:
            self._give_up(error)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:
        size = self._stream.readinto(buffer)
        try:
            if self._file and size:
                self._write(memoryview(buffer)[:size])
        except OSError as error:
            self._give_up(error)
        return size

    def finish(self, path: Path) -> None:
        """Rename the file, which is now complete, to `path`."""
        if not self._file:
            return
        try:
            self._file.flush()
            self._file.truncate(self._size)
            os.fsync(self._file.fileno())
            with self._cache.locked():
                os.rename(self._file.name, path)
        except OSError as error:
            return self._give_up(error)
        self._file.close()
        self._file = None
        self._on_use(1, "")

    def discard(self) -> None:
        """Remove the file unless it is finished."""
        if file := self._file:
            self._file = None
            with suppress(OSError):
                os.unlink(file.name)
            with suppress(OSError):  # on a full disk, when it writes its buffer
                file.close()

    def _write(self, data: memoryview) -> None:
        if self._size + len(data) > self._reserved:
            self._reserved = self._size + max(len(data), self._cache.step)
            self._cache.grow(self._file, self._reserved)
        self._file.write(data)
        self._size += len(data)

    def _give_up(self, error: OSError) -> None:
        self.discard()
        self._on_use(2, str(error))


def _remove_unused(path: str) -> bool:
    """Remove a file unless a process has it open and locked; return whether it is gone."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True
