"""A lock for one writer at a time, which the system releases when the process ends, however it ends."""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_held: set[int] = set()  # descriptors of this process's lock files


class InUseError(OSError):
    """Another process holds the lock; the message names it."""


@contextmanager
def locked(target: str | Path) -> Iterator[None]:
    """Within the block, be the only process that writes the file or folder `target`. Raises InUseError, OSError.

    The lock file, `.<name>.lock` beside a file or `.lock` in a folder, names the process that holds it. A file left over
    from a dead process does not lock. A file system without locks gives only a warning.
    """
    target = Path(target)
    path = target / ".lock" if target.is_dir() else target.with_name(f".{target.name}.lock")
    descriptor = _take(path, target)
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:  # not in a forked process
            with suppress(OSError):
                if _is_file_at(path, descriptor):
                    path.unlink()  # before unlocking: a process that has just opened it sees that it is gone
            _held.remove(descriptor)
            os.close(descriptor)


def _take(path: Path, target: Path) -> int:
    """Create and lock the lock file at `path`; return its descriptor. Raises InUseError if it is locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 200).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise InUseError(
                f"'{target}' is being written by {owner}; wait for its end, end it, or write elsewhere. If that "
                f"machine is gone and its lock was not released, delete '{path}'"
            ) from None
        except OSError as error:
            logging.warning(
                "'%s' cannot be locked (%s); see to it that nothing else writes there",
                target,
                error,
            )
        # else the last owner has removed the file since it was opened: try again with a new one
        if _is_file_at(path, descriptor):
            owner = f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}"
            with suppress(OSError):  # with a full disk, lock without naming the owner
                os.ftruncate(descriptor, 0)
                os.write(descriptor, owner.encode())
            return descriptor
        os.close(descriptor)


def _is_file_at(path: Path, descriptor: int) -> bool:
    """Return whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _close_in_child() -> None:
    """Close a forked process's copies of lock files: with them, workers would hold the locks of a killed parent."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_close_in_child)
