"""A parser of captions and descriptions: free text back into attributes."""

import re
from dataclasses import dataclass

from minigpt4.quickstart.language import NUMBERS
from minigpt4.quickstart.world import BACKGROUNDS, CELLS, COLOURS, SHAPES, SIZES


def _any(words) -> str:
    """A pattern for any of `words`, the longer ones first ('top left' before 'top')."""
    return "|".join(sorted(words, key=len, reverse=True))


_MENTION = re.compile(rf"\b(?:({_any(SIZES)}) )?(?:({_any(COLOURS)}) )?({_any(SHAPES)})\b")
_CELL = re.compile(rf"(?<!to the )\b({_any(CELLS)})\b(?! of\b)")
_COUNT = re.compile(rf"\b({_any(NUMBERS)}) (?:objects?|shapes?|things?|items?)\b")
_BACKGROUND = re.compile(rf"\b({_any(BACKGROUNDS)})\b")


@dataclass(frozen=True)
class Mention:
    """An object as a text describes it; None: not said."""

    size: str | None
    colour: str | None
    shape: str
    cell: str | None


@dataclass(frozen=True)
class Parsed:
    """What a text says of a scene; None: not said."""

    count: int | None
    background: str | None
    objects: tuple[Mention, ...]


def parse(text: str) -> Parsed:
    """What a caption or description says, objects in the order of their first mention.

    In a scene no two objects share shape and colour, so a mention that fits an object named before
    means that object. The number of objects is the number said, else that of objects mentioned.
    """
    text = re.sub(r"\s+", " ", text.lower())
    objects: list[Mention] = []
    for clause in re.split(r"[.;,:]| and ", text):
        mentions = list(_MENTION.finditer(clause))
        for mention, following in zip(
            mentions, [*mentions[1:], None][: len(mentions)], strict=True
        ):
            cell = _CELL.search(
                clause, mention.end(), following.start() if following else len(clause)
            )
            cell = cell or (
                _CELL.search(clause, 0, mention.start()) if mention is mentions[0] else None
            )
            new = Mention(*mention.groups(), cell and cell[1])
            known = next((i for i, o in enumerate(objects) if _same(new, o)), None)
            if known is None:
                objects.append(new)
            else:
                o = objects[known]
                objects[known] = Mention(
                    o.size or new.size, o.colour or new.colour, o.shape, o.cell or new.cell
                )
    count, background = _COUNT.search(text), _BACKGROUND.search(text)
    return Parsed(
        NUMBERS.index(count[1]) + 1 if count else len(objects) or None,
        background and background[1],
        tuple(objects),
    )


def _same(a: Mention, b: Mention) -> bool:
    return a.shape == b.shape and (a.colour == b.colour or None in (a.colour, b.colour))
