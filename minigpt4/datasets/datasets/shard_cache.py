"""Shards from elsewhere in a folder of bounded size, shared by all processes of a machine.

A shard is kept while it is read: each byte goes to the reader and into a file of the reader's own, which takes the
shard's name once it is whole and on disk. Whatever is open here is locked, so the files that nobody uses are known
wherever their processes ended; of these the least recently used ones are removed where room is needed. What cannot be
kept (a full disk, a shard larger than the bound, another fault of the folder) is read all the same.
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

STEP = 16 << 20  # bytes at most by which a file that is written is made larger at a time
USES = ("shards read from it", "kept in it", "not kept")  # what became of a shard
_OWN_NAME = re.compile(r"[0-9a-f]{32}\.tar|shard-\w+\.partial")
Note = Callable[[int, str], None]  # is told which of USES, and why


class ShardCache:
    """A folder of at most `max_bytes`, counted by the sizes of its files. Made where it is missing."""

    def __init__(self, folder: str | Path, max_bytes: int):
        self.folder, self.max_bytes = Path(folder), max_bytes
        self.step = min(STEP, max_bytes // 64)

    @contextmanager
    def opened(
        self, address: str, fetch: Callable[[str], AbstractContextManager], note: Note
    ) -> Iterator[BinaryIO]:
        """Give a binary stream of a shard: the file that was kept, else `fetch(address)`, which is then kept.

        A kept file at which its reader raises an error is removed: the next reader fetches the shard anew. A new one is
        kept only if neither its reader nor `fetch` raises one.
        """
        path = self.folder / f"{hashlib.blake2b(address.encode(), digest_size=16).hexdigest()}.tar"
        if file := self._kept(path, note):
            note(0, "")
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
                copy = _Copy(stream, self, note)
                yield io.BufferedReader(copy)
                copy.readall()  # behind the archive's end
            copy.finish(path)
        finally:
            if copy:
                copy.drop()

    def _kept(self, path: Path, note: Note) -> BinaryIO | None:
        """Return the kept file, locked against its removal, None if there is none."""
        try:
            file = open(path, "rb")  # noqa: SIM115
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.utime(file.fileno())  # the order of removal
            return file
        except (FileNotFoundError, BlockingIOError):  # the latter: it is just being removed
            return None
        except OSError as error:
            note(2, str(error))
            return None

    def grow(self, file: BinaryIO, size: int) -> None:
        """Make a file of this folder `size` bytes large. Raises OSError if there is no room for it."""
        more = size - os.fstat(file.fileno()).st_size
        with self.locked():
            files = sorted(self._files(), key=lambda each: each[1].st_mtime_ns)
            excess = sum(state.st_size for _, state in files) + more - self.max_bytes
            for path, state in files:
                if excess > 0 and _remove_unused(path):
                    excess -= state.st_size
            if excess > 0:
                raise OSError(f"no room in {self.max_bytes:,} bytes: what is there is in use")
            file.truncate(size)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let no other process make a file larger or give it another name meanwhile: files are counted here."""
        with open(self.folder / ".lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        for entry in os.scandir(self.folder):
            if _OWN_NAME.fullmatch(entry.name):  # whatever else lies there is not the cache's
                with suppress(FileNotFoundError):
                    yield entry.path, entry.stat()


class _Copy(io.RawIOBase):
    """The bytes of `stream`, which are also written to a file of `cache` until there is no more room."""

    def __init__(self, stream: BinaryIO, cache: ShardCache, note: Note):
        self._stream, self._cache = stream, cache
        self._note, self._file = note, None
        self._size, self._room = 0, 0
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
        """Give the file, which is whole, its name."""
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
        self._note(1, "")

    def drop(self) -> None:
        """Remove the file, if it is not finished."""
        if file := self._file:
            self._file = None
            with suppress(OSError):  # of a full disk: what is not written yet
                os.unlink(file.name)
            with suppress(OSError):
                file.close()

    def _write(self, data: memoryview) -> None:
        if self._size + len(data) > self._room:
            self._room = self._size + max(len(data), self._cache.step)
            self._cache.grow(self._file, self._room)
        self._file.write(data)
        self._size += len(data)

    def _give_up(self, error: OSError) -> None:
        self.drop()
        self._note(2, str(error))


def _remove_unused(path: str) -> bool:
    """Remove a file unless a process has it open here; return whether it is gone."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True
