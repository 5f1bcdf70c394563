"""Questions about scenes with their right answers, in the words of stage 2 and in those of the evaluation."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from minigpt4.quickstart.language import (
    CELL_PHRASES,
    INVERSE,
    NUMBERS,
    count_phrase,
    name_of,
    relations,
)
from minigpt4.quickstart.world import BACKGROUNDS, CELLS, COLOURS, SHAPES, SIZES, Object, Scene

# The evaluation's words, which training never shows, and those of stage 2; {} is the subject.
_ASKED = {
    "count": "How many objects are there?",
    "background": "What is the background?",
    "colour": "What colour is the {}?",
    "size": "What size is the {}?",
    "position": "Where is the {}?",
    "shape": "What shape is the {} object?",
    "relation": "What is {}?",
}
_TAUGHT = {
    "count": (
        "How many things can you see?",
        "What is the number of objects?",
        "Count the objects.",
    ),
    "background": (
        "What does the background look like?",
        "Which background is it?",
        "Name the background.",
    ),
    "colour": (
        "What is the colour of the {}?",
        "Which colour is the {}?",
        "Name the colour of the {}.",
    ),
    "size": ("What is the size of the {}?", "How large is the {}?", "Is the {} small or large?"),
    "position": (
        "Where can you see the {}?",
        "Where in the picture is the {}?",
        "Name the place of the {}.",
    ),
    "shape": (
        "What is the shape of the {} object?",
        "Which shape is the {} object?",
        "Name the {} object.",
    ),
    "relation": ("What can you see {}?", "Which object is {}?", "Name the object {}."),
}
_POSSIBLE_ANSWERS = {
    "count": NUMBERS,
    "background": BACKGROUNDS,
    "colour": COLOURS,
    "size": SIZES,
    "position": CELLS,
    "shape": SHAPES,
    "relation": SHAPES,
}


@dataclass(frozen=True)
class Question:
    """A question with one right answer: `answer` as a word or two, `sentence` as a whole sentence."""

    kind: str
    subject: str
    answer: str
    sentence: str

    @property
    def text(self) -> str:
        """The question in the evaluation's words."""
        return _ASKED[self.kind].format(self.subject)

    def taught(self, rng: np.random.Generator) -> str:
        """Return the question in one of the wordings of stage 2."""
        return _TAUGHT[self.kind][rng.integers(3)].format(self.subject)

    def is_answered_by(self, text: str) -> bool:
        """Whether the first possible answer that `text` mentions is the right one.

        Words of the question itself do not count: an answer may repeat them.
        """
        text = text.lower()
        for digit, word in zip("123", NUMBERS, strict=True):
            text = re.sub(rf"\b{digit}\b", word, text)
        possible = _POSSIBLE_ANSWERS[self.kind]
        if self.kind != "position":
            asked = set(re.findall(r"\w+", self.text.lower()))
            possible = [word for word in possible if word not in asked]
        # longer ones first: 'top left' before 'top'
        match = re.search(rf"\b({'|'.join(sorted(possible, key=len, reverse=True))})\b", text)
        return bool(match) and match[1] == self.answer


def questions(scene: Scene) -> list[Question]:
    """Return all questions about a scene of up to three objects that have one right answer."""
    number = len(scene.objects)
    verb = "is" if number == 1 else "are"
    article = "a " if scene.background in ("night sky", "brick wall") else ""
    background = f"The background is {article}{scene.background}."
    result = [
        Question("count", "", NUMBERS[number - 1], f"There {verb} {count_phrase(scene)}."),
        Question("background", "", scene.background, background),
    ]
    for item in scene.objects:
        result += about(item, scene)
    if len({o.shape for o in scene.objects}) == number == 2:
        ((first, relation, second),) = relations(scene)
        for a, how, b in ((first, relation, second), (second, INVERSE[relation], first)):
            sentence = f"The {a.shape} is {how} the {b.shape}."
            result.append(Question("relation", f"{how} the {b.shape}", a.shape, sentence))
    return result


def about(item: Object, scene: Scene) -> Iterator[Question]:
    """Yield the questions about one object that have one right answer, in a scene of any number of objects."""
    name = name_of(item, scene)
    if name == item.shape:
        yield Question("colour", name, item.colour, f"The {name} is {item.colour}.")
    yield Question("size", name, item.size, f"The {name} is {item.size}.")
    yield Question("position", name, item.cell, f"The {name} is {CELL_PHRASES[item.cell]}.")
    if sum(o.colour == item.colour for o in scene.objects) == 1:
        yield Question(
            "shape", item.colour, item.shape, f"The {item.colour} object is a {item.shape}."
        )


def draw_question(scene: Scene, index: int) -> Question:
    """Return one of the scene's questions; over successive `index` the kinds alternate."""
    by_kind: dict[str, list[Question]] = {}
    for question in questions(scene):
        by_kind.setdefault(question.kind, []).append(question)
    of_kind = by_kind[sorted(by_kind)[index % len(by_kind)]]
    return of_kind[index % len(of_kind)]
