"""One writer at a time: a lock that the system itself releases when the process ends, however it ends."""

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
    """Another process writes there; the message names it."""


@contextmanager
def locked(target: str | Path) -> Iterator[None]:
    """Be the only process that writes the file or folder `target` within the block. Raises InUseError, OSError.

    The lock is a file, `.<name>.lock` beside a file or `.lock` in a folder, that says who holds it. One that is left
    over locks nothing. On a file system without locks there is a warning instead.
    """
    target = Path(target)
    path = target / ".lock" if target.is_dir() else target.with_name(f".{target.name}.lock")
    descriptor = _take(path, target)
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:  # not in a fork
            with suppress(OSError):
                if _is_still_at(path, descriptor):
                    path.unlink()  # before the lock is released: who opened it meanwhile sees that it is gone
            _held.remove(descriptor)
            os.close(descriptor)


def _take(path: Path, target: Path) -> int:
    """Return the descriptor of the lock file, locked."""
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
        if _is_still_at(path, descriptor):
            owner = f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}"
            with suppress(OSError):  # a full disk: it is locked without a name
                os.ftruncate(descriptor, 0)
                os.write(descriptor, owner.encode())
            return descriptor
        os.close(descriptor)


def _is_still_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _leave_to_parent() -> None:
    """A lock lasts as long as any copy of its descriptor: workers that outlive a killed process must have none."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_leave_to_parent)
