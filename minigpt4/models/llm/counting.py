"""Tensors without values take the way of a GPU where its memory is counted on a machine that has none."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_counting = ContextVar("counting", default=False)


@contextmanager
def as_on_gpu(is_so: bool = True) -> Iterator[None]:
    """Inside the block, tensors without values take the way of a GPU, wherever they say they lie."""
    token = _counting.set(is_so)
    try:
        yield
    finally:
        _counting.reset(token)


def is_as_on_gpu() -> bool:
    """Whether the call is made inside `as_on_gpu`."""
    return _counting.get()
