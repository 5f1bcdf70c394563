"""A switch for counting a GPU's memory on a machine without one: tensors without values take the GPU's code paths."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_counting = ContextVar("counting", default=False)


@contextmanager
def as_on_gpu(is_so: bool = True) -> Iterator[None]:
    """Within the block tensors without values take the code paths of a GPU, whatever their device is."""
    token = _counting.set(is_so)
    try:
        yield
    finally:
        _counting.reset(token)


def is_as_on_gpu() -> bool:
    """Whether this is called inside an `as_on_gpu` block."""
    return _counting.get()
