"""Questions about scenes, and what an answer says: the reading of free text back into attributes."""

import re
from dataclasses import dataclass

from minigpt4.embedded.language import BACKGROUND_PHRASES, INVERSE, NUMBERS, name_of, relations
from minigpt4.embedded.world import BACKGROUNDS, CELLS, COLOURS, SHAPES, SIZES, Scene


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
class Reading:
    count: int | None
    background: str | None
    objects: tuple[Mention, ...]


def read(text: str) -> Reading:
    """What a caption or description says, objects in the order of their first mention.

    In a scene no two objects share shape and colour, so a mention that fits an object named before means that object.
    The number of objects is the number said, else the number of objects mentioned.
    """
    text = re.sub(r"\s+", " ", text.lower())
    objects: list[Mention] = []
    for clause in re.split(r"[.;,:]| and ", text):
        mentions = list(_MENTION.finditer(clause))
        for mention, following in zip(mentions, [*mentions[1:], None][: len(mentions)], strict=True):
            cell = _CELL.search(clause, mention.end(), following.start() if following else len(clause))
            cell = cell or (_CELL.search(clause, 0, mention.start()) if mention is mentions[0] else None)
            found = Mention(*mention.groups(), cell and cell[1])
            known = next((i for i, o in enumerate(objects) if _same(found, o)), None)
            if known is None:
                objects.append(found)
            else:
                o = objects[known]
                objects[known] = Mention(o.size or found.size, o.colour or found.colour, o.shape, o.cell or found.cell)
    count, background = _COUNT.search(text), _BACKGROUND.search(text)
    return Reading(
        NUMBERS.index(count[1]) + 1 if count else len(objects) or None,
        background and background[1],
        tuple(objects),
    )


def _same(a: Mention, b: Mention) -> bool:
    return a.shape == b.shape and (a.colour == b.colour or None in (a.colour, b.colour))


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def questions(scene: Scene) -> list[Question]:
    """All questions about the scene with one right answer."""
    result = [
        Question("count", "How many objects are there?", NUMBERS[len(scene.objects) - 1]),
        Question("background", "What is the background?", scene.background),
    ]
    for item in scene.objects:
        name = name_of(item, scene)
        if name == item.shape:
            result.append(Question("colour", f"What colour is the {name}?", item.colour))
        if item.size not in name:
            result.append(Question("size", f"What size is the {name}?", item.size))
        result.append(Question("position", f"Where is the {name}?", item.cell))
        if sum(o.colour == item.colour for o in scene.objects) == 1:
            result.append(Question("shape", f"What shape is the {item.colour} object?", item.shape))
    if len({o.shape for o in scene.objects}) == len(scene.objects) == 2:
        ((first, relation, second),) = relations(scene)
        result.append(Question("relation", f"What is {relation} the {second.shape}?", first.shape))
        result.append(Question("relation", f"What is {INVERSE[relation]} the {first.shape}?", second.shape))
    return result


_VOCABULARY = {"count": NUMBERS, "background": tuple(BACKGROUND_PHRASES), "colour": COLOURS, "size": SIZES,
               "position": CELLS, "shape": SHAPES, "relation": SHAPES}  # fmt: skip


def is_right(question: Question, answer: str) -> bool:
    """Whether the first word of the answer that could be an answer, and is not in the question, is the right one."""
    text = answer.lower()
    for digit, word in zip("123", NUMBERS, strict=True):
        text = re.sub(rf"\b{digit}\b", word, text)
    asked = set(re.findall(r"\w+", question.text.lower()))
    words = [w for w in _VOCABULARY[question.kind] if question.kind == "position" or w not in asked]
    found = re.search(rf"\b({_any(words)})\b", text)
    return bool(found) and found[1] == question.answer
