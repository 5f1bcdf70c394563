"""Match answers with their ground truth by id; the ids of both must be the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

Ids = Mapping[Hashable, Any]
Tokenize = Callable[[str], Iterable[str]]


def keyed(values: Ids | Sequence[Any], name: str) -> Ids:
    """Return a mapping id -> value; the ids of a list are its positions. Raises ValueError for anything else."""
    if isinstance(values, Mapping):
        return values
    if isinstance(values, (list, tuple)):
        return dict(enumerate(values))
    raise ValueError(f"{name}: found {_kind(values)}; expected a mapping id -> value, or a list")


def matched(
    answers: Ids | Sequence[str], truth: Ids | Sequence[Any], truth_name: str
) -> tuple[dict, Ids]:
    """Return answers and ground truth by id, the answers in the order of the ground truth.

    Raises ValueError for no items, an answer that is not text, and ids that only one side has.
    """
    answers, truth = keyed(answers, "answers"), keyed(truth, truth_name)
    _check_ids(answers, truth, truth_name)
    if not truth:
        raise ValueError("there is no answer to score")
    return {item: text_of(answers[item], f"answer of {item!r}") for item in truth}, truth


def aligned(values: Ids | Sequence[Any], truth: Ids, name: str) -> Ids:
    """Return further values of each item, by id. Raises ValueError for ids that only one side has."""
    values = keyed(values, name)
    _check_ids(values, truth, name)
    return values


def text_of(value: Any, name: str) -> str:
    """Return `value`. Raises ValueError unless it is text."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: found {_kind(value)}; expected text")
    return value


def texts_of(values: Any, name: str) -> list[str]:
    """Return `values` as a list. Raises ValueError unless it is a list of at least one text."""
    # A single text is refused: its letters would be taken for texts.
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name}: found {_kind(values)}; expected a list of texts")
    texts = [text_of(value, name) for value in values]
    if not texts:
        raise ValueError(f"{name}: there is none")
    return texts


def _check_ids(values: Ids, truth: Ids, name: str) -> None:
    """Raise ValueError unless both have the same ids."""
    surplus = [item for item in values if item not in truth]
    missing = [item for item in truth if item not in values]
    problems = []
    if surplus:
        problems.append(f"{len(surplus)} without {name}: {_first(surplus)}")
    if missing:
        problems.append(f"{len(missing)} without an answer: {_first(missing)}")
    if problems:
        raise ValueError(f"the ids do not match; {'; '.join(problems)}")


def _first(ids: list) -> str:
    shown = ", ".join(repr(item) for item in ids[:3])
    return f"{shown}, .." if len(ids) > 3 else shown


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
