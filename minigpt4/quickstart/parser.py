"""Parse captions and descriptions: free text back into attributes."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from minigpt4.quickstart.language import NUMBERS
from minigpt4.quickstart.world import BACKGROUNDS, CELLS, COLOURS, SHAPES, SIZES


def _any(words: Iterable[str]) -> str:
    """Return a regular expression for any of `words`, the longer ones first ('top left' before 'top')."""
    return "|".join(sorted(words, key=len, reverse=True))


_MENTION = re.compile(rf"\b(?:({_any(SIZES)}) )?(?:({_any(COLOURS)}) )?({_any(SHAPES)})\b")
_CELL = re.compile(rf"(?<!to the )\b({_any(CELLS)})\b(?! of\b)")
_COUNT = re.compile(rf"\b({_any(NUMBERS)}) (?:objects?|shapes?|things?|items?)\b")
_BACKGROUND = re.compile(rf"\b({_any(BACKGROUNDS)})\b")


@dataclass(frozen=True)
class Mention:
    """An object as a text describes it; None: not mentioned."""

    size: str | None
    colour: str | None
    shape: str
    cell: str | None


@dataclass(frozen=True)
class Parsed:
    """What a text says about a scene; None: not mentioned."""

    count: int | None
    background: str | None
    objects: tuple[Mention, ...]


def parse(text: str) -> Parsed:
    """Return what a caption or description says, objects in the order of their first mention.

    No two objects of a scene share shape and colour, so a mention that fits an object mentioned before is taken for
    that object. The count is the number that the text states, else the number of objects mentioned.
    """
    text = re.sub(r"\s+", " ", text.lower())
    objects: list[Mention] = []
    for clause in re.split(r"[.;,:]| and ", text):
        for new in _mentions(clause):
            known = next((i for i, o in enumerate(objects) if _may_be_same(new, o)), None)
            if known is None:
                objects.append(new)
            else:
                o = objects[known]
                objects[known] = Mention(
                    o.size or new.size, o.colour or new.colour, o.shape, o.cell or new.cell
                )
    stated, background = _COUNT.search(text), _BACKGROUND.search(text)
    count = NUMBERS.index(stated[1]) + 1 if stated else len(objects)
    return Parsed(count or None, background and background[1], tuple(objects))


def _mentions(clause: str) -> Iterator[Mention]:
    """Yield the objects that a clause mentions, each with the cell named after it; for the first one also before it."""
    matches = list(_MENTION.finditer(clause))
    ends = [following.start() for following in matches[1:]] + [len(clause)]
    for number, match in enumerate(matches):
        cell = _CELL.search(clause, match.end(), ends[number])
        if cell is None and number == 0:
            cell = _CELL.search(clause, 0, match.start())
        yield Mention(*match.groups(), cell and cell[1])


def _may_be_same(a: Mention, b: Mention) -> bool:
    """Whether two mentions have the same shape, and no different colours."""
    return a.shape == b.shape and (a.colour == b.colour or None in (a.colour, b.colour))
