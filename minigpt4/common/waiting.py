"""What this process waits for: code that may wait long registers it here, for a watch in another thread."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Wait:
    """A wait: `what()` describes it, `progress()` returns a value that changes while there is progress."""

    what: Callable[[], str]
    progress: Callable[[], object]
    since: float = field(default_factory=time.monotonic)


_current: Wait | None = None


@contextmanager
def waiting_for(what: Callable[[], str], progress: Callable[[], object] = str) -> Iterator[None]:
    """Register that this process waits for `what()` within the block."""
    global _current
    _current = Wait(what, progress)
    try:
        yield
    finally:
        _current = None


def current_wait() -> Wait | None:
    """Return what this process waits for, None if it does not wait."""
    return _current
