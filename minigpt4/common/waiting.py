"""What this process waits for. Who may wait long says so, so that a watch in another thread can tell and end it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Wait:
    """`what` says it in words; `progress` changes as long as there is some, though nothing has come yet."""

    what: Callable[[], str]
    progress: Callable[[], object]
    since: float = field(default_factory=time.monotonic)


_current: Wait | None = None


@contextmanager
def waiting_for(what: Callable[[], str], progress: Callable[[], object] = str) -> Iterator[None]:
    """Within the block this process waits for `what()`."""
    global _current
    _current = Wait(what, progress)
    try:
        yield
    finally:
        _current = None


def current_wait() -> Wait | None:
    """Return what this process waits for, if it waits."""
    return _current
