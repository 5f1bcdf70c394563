"""CHAIR: which of COCO's 80 objects a description names that are not in the image."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from minigpt4.evaluation.metrics.matching import Ids, aligned, matched, text_of, texts_of

Synonyms = Mapping[str, Sequence[str]]

_IRREGULAR = {
    "person": "people",
    "child": "children",
    "knife": "knives",
    "mouse": "mice",
    "goose": "geese",
}
_IRREGULAR |= {"ox": "oxen", "calf": "calves", "man": "men"}
CHAIR_COUNTS = [
    "mentions",
    "wrong mentions",
    "answers",
    "wrong answers",
    "objects",
    "objects named",
]
NO_OBJECT = (
    "no object"  # entry of the synonyms for phrases such as train station, which are no object
)
# before one of these animals, "baby" and "adult" are no person; nor is the passenger of a passenger train
_ANIMALS = [
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "animal",
    "cub",
]
_QUALIFIED = {"passenger jet": "jet", "passenger train": "train", "toilet seat": "toilet"}
_TOILETS = {"toilet", "toilets", "toilet seat", "toilet seats"}
_QUALIFIED |= {f"baby {animal}": animal for animal in _ANIMALS} | {
    f"adult {animal}": animal for animal in _ANIMALS
}


def chair(
    answers: Mapping[Hashable, str] | Sequence[str],
    objects: Mapping[Hashable, Iterable[str]] | Sequence[Iterable[str]],
    references: Mapping[Hashable, Sequence[str]] | Sequence[Sequence[str]] | None = None,
    synonyms: Synonyms | None = None,
) -> dict:
    """Return {"CHAIRs", "CHAIRi", "recall", "mentions", "wrong_mentions", "count", "wrong": {id: objects}}.

    Shares are 0 to 1. CHAIRs: of answers, those that name an object that is not there, however long the answer.
    CHAIRi: wrong mentions / all mentions; each repetition counts. `recall`: the objects of the images that were named,
    of all; an answer that names nothing has no wrong mention either.
    The rule is that of LisaAnne/Hallucination, `utils/chair.py`: what is there are the `objects`, the COCO names of an
    image's segments, and what the `references`, people's captions of it, name. Published figures use both, and that
    repository's synonyms.txt: pass `read_synonyms(path)`; `synonyms` default to our own coco_objects.json.
    Raises ValueError for ids that do not match, an object without an entry, and what is not text.
    """
    read = _read(answers, objects, references, synonyms)
    wrong = {item: _wrong(mentions, there) for item, (mentions, there) in read.items()}
    return chair_of(sum(_counts(read).values())) | {"wrong": wrong}


def chair_counts(
    answers: Mapping[Hashable, str] | Sequence[str],
    objects: Mapping[Hashable, Iterable[str]] | Sequence[Iterable[str]],
    references: Mapping[Hashable, Sequence[str]] | Sequence[Sequence[str]] | None = None,
    synonyms: Synonyms | None = None,
) -> dict[Hashable, np.ndarray]:
    """Return by id what `chair_of` makes figures of, for one item or a sum: CHAIR_COUNTS [6]."""
    return _counts(_read(answers, objects, references, synonyms))


def chair_of(counts: np.ndarray) -> dict:
    """Return the figures of `chair` of counts [6], those of one item of `chair_counts` or a sum of them."""
    count = dict(zip(CHAIR_COUNTS, map(int, counts), strict=True))
    return {
        "CHAIRs": count["wrong answers"] / count["answers"],
        "CHAIRi": count["wrong mentions"] / count["mentions"] if count["mentions"] else 0.0,
        "recall": count["objects named"] / count["objects"] if count["objects"] else 0.0,
        "mentions": count["mentions"],
        "wrong_mentions": count["wrong mentions"],
        "count": count["answers"],
    }


def mentioned_objects(text: str, synonyms: Synonyms | None = None) -> list[str]:
    """Return the COCO name of each object that `text` mentions, in order, repetitions included.

    Case and number do not count, the longest phrase wins ("hot dogs" is no dog), a baby elephant is no person, and a
    seat beside a toilet no chair.
    """
    return _mentions(text, _own_names() if synonyms is None else _names(synonyms))


def read_synonyms(path: str | Path) -> dict[str, list[str]]:
    """Return a table as `chair` takes it, of a file with a line "name, synonym, .." for each object.

    Raises OSError for a file that cannot be read, ValueError for one without such a line.
    """
    table = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        name, *others = [part.strip() for part in line.split(",")]
        if name:
            table[name] = others
    if not any(table.values()):
        raise ValueError(f"'{path}' has no line \"name, synonym, ..\"")
    return table


def _read(answers: Ids, objects: Ids, references: Ids | None, synonyms: Synonyms | None) -> dict:
    """Return by id what the answer mentions, in order, and the set of what is there."""
    said, present = matched(answers, objects, "objects")
    captions = aligned(references, present, "references") if references is not None else {}
    names = _own_names() if synonyms is None else _names(synonyms)
    read = {}
    for item, text in said.items():
        there = {_name_of(name, names, item) for name in _listed(present[item], item)}
        for caption in texts_of(captions[item], f"references of {item!r}") if captions else ():
            there.update(_mentions(caption, names))
        read[item] = (_mentions(text, names), there)
    return read


def _counts(read: dict) -> dict[Hashable, np.ndarray]:
    counts = {}
    for item, (mentions, there) in read.items():
        wrong = len(_wrong(mentions, there))
        counts[item] = np.array(
            [len(mentions), wrong, 1, wrong > 0, len(there), len(there & set(mentions))]
        )
    return counts


def _wrong(mentions: list[str], there: set[str]) -> list[str]:
    return [name for name in mentions if name not in there]


def _mentions(text: str, names: Mapping[str, str]) -> list[str]:
    # a mark is a word too, so that no phrase reaches over it
    words = re.findall(r"\w+(?:-\w+)*|[^\w\s]", text.lower())
    found, start = [], 0
    while start < len(words):
        # three words are the longest phrase of the tables
        for end in range(min(start + 3, len(words)), start, -1):
            phrase = " ".join(words[start:end])
            if phrase in names or end == start + 1:
                break
        # a hyphen may stand for the blank of a phrase: hot-dog
        name = names.get(phrase) or names.get(phrase.replace("-", " "), NO_OBJECT)
        found.append((phrase, name))
        start = end
    if any(phrase in _TOILETS for phrase, _ in found):
        found = [(phrase, name) for phrase, name in found if phrase not in ("seat", "seats")]
    return [name for _, name in found if name != NO_OBJECT]


def own_synonyms() -> dict[str, list[str]]:
    """Return our table, coco_objects.json: COCO's 80 names and NO_OBJECT, with the words and phrases for each."""
    return json.loads(Path(__file__).with_name("coco_objects.json").read_text(encoding="utf-8"))


@cache
def _own_names() -> dict[str, str]:
    return _names(own_synonyms())


def _names(synonyms: Synonyms) -> dict[str, str]:
    """Return the COCO name of each phrase and of its plural."""
    names = {}
    for name, others in synonyms.items():
        names |= dict.fromkeys([name.lower(), *(other.lower() for other in others)], name)
    for phrase, word in _QUALIFIED.items():
        names[phrase] = names.get(word, NO_OBJECT)
    # a word that has an entry of its own is no other's plural
    plurals = {}
    for phrase, name in names.items():
        plurals |= dict.fromkeys(_plurals(phrase), name)
    return plurals | names


def _plurals(phrase: str) -> list[str]:
    """Return how the plural may be written; a form that no one writes does no harm."""
    plurals = [phrase + "s"]
    if re.search(r"(?:[sxzo]|ch|sh)$", phrase):
        plurals.append(phrase + "es")
    if re.search(r"[^aeiou]y$", phrase):
        plurals.append(phrase[:-1] + "ies")
    endings = [singular for singular in _IRREGULAR if phrase.endswith(singular)]
    return plurals + [phrase.removesuffix(singular) + _IRREGULAR[singular] for singular in endings]


def _name_of(name: str, names: Mapping[str, str], item: Hashable) -> str:
    found = names.get(text_of(name, f"objects of {item!r}").lower())
    if found is None:
        raise ValueError(f"objects of {item!r}: {name!r} has no entry in the synonyms")
    return found


def _listed(values: Iterable[str], item: Hashable) -> Iterable[str]:
    # the letters of a text would pass for objects
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(
            f"objects of {item!r}: found {values!r}; expected a list of names, which may be empty"
        )
    return values
