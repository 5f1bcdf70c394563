"""CHAIR: which of COCO's 80 objects a description mentions that are not in the image."""

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
    "ox": "oxen",
    "calf": "calves",
    "man": "men",
}
CHAIR_COUNTS = [
    "mentions",
    "wrong mentions",
    "answers",
    "wrong answers",
    "objects",
    "objects named",
]
NO_OBJECT = "no object"  # the synonyms' entry for phrases such as train station
# "baby" or "adult" before one of these animals is not a person; neither is "passenger" before a train
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

    Fractions are 0 to 1. CHAIRs: answers that mention at least one absent object / all answers. CHAIRi: wrong mentions
    / all mentions; repetitions count. `recall`: objects present that were mentioned / all objects present; an answer
    that mentions nothing has no wrong mention, but recall 0.
    The rule is that of LisaAnne/Hallucination, `utils/chair.py`: present are the `objects`, the COCO names of an image's
    segments, and those that the `references`, human captions of the image, mention. Published results use both, and
    that repository's synonyms.txt: pass `read_synonyms(path)`; by default `synonyms` is our own coco_objects.json.
    Raises ValueError for ids that do not match, an object without an entry, and anything that is not text.
    """
    found = _mentioned_and_present(answers, objects, references, synonyms)
    wrong = {item: _wrong(mentions, present) for item, (mentions, present) in found.items()}
    return chair_of(sum(_counts(found).values())) | {"wrong": wrong}


def chair_counts(
    answers: Mapping[Hashable, str] | Sequence[str],
    objects: Mapping[Hashable, Iterable[str]] | Sequence[Iterable[str]],
    references: Mapping[Hashable, Sequence[str]] | Sequence[Sequence[str]] | None = None,
    synonyms: Synonyms | None = None,
) -> dict[Hashable, np.ndarray]:
    """Return, by id, the CHAIR_COUNTS [6] that `chair_of` computes the metrics from, for one item or a sum."""
    return _counts(_mentioned_and_present(answers, objects, references, synonyms))


def chair_of(counts: np.ndarray) -> dict:
    """Return the metrics of `chair` from counts [6], those of one item of `chair_counts` or a sum of them."""
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

    Case and number are ignored and the longest phrase wins ("hot dogs" is no dog). A baby elephant is not a person, and
    "seat" in a text with a toilet is not a chair. "hot-dog" and "cat/dog" name three objects by our own table; with other
    `synonyms` each is an unknown word, as in the authors' tokenizer.
    """
    is_own = synonyms is None
    return _mentions(text, _own_names() if is_own else _names(synonyms), is_own)


def read_synonyms(path: str | Path) -> dict[str, list[str]]:
    """Return the `synonyms` for `chair` from a file with a line "name, synonym, .." for each object.

    Raises OSError for a file that cannot be read, ValueError for a file without such a line.
    """
    table = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        name, *others = [part.strip() for part in line.split(",")]
        if name:
            table[name] = others
    if not any(table.values()):
        raise ValueError(f"'{path}' has no line \"name, synonym, ..\"")
    return table


def _mentioned_and_present(
    answers: Ids, objects: Ids, references: Ids | None, synonyms: Synonyms | None
) -> dict[Hashable, tuple[list[str], set[str]]]:
    """Return, by id, the objects that the answer mentions, in order, and the set of objects that are present."""
    texts, objects = matched(answers, objects, "objects")
    captions = aligned(references, objects, "references") if references is not None else {}
    is_own = synonyms is None
    names = _own_names() if is_own else _names(synonyms)
    found = {}
    for item, text in texts.items():
        present = {_name_of(name, names, item) for name in _listed(objects[item], item)}
        if captions:
            for caption in texts_of(captions[item], f"references of {item!r}"):
                present.update(_mentions(caption, names, is_own))
        found[item] = (_mentions(text, names, is_own), present)
    return found


def _counts(found: dict[Hashable, tuple[list[str], set[str]]]) -> dict[Hashable, np.ndarray]:
    """Return the CHAIR_COUNTS of each item."""
    counts = {}
    for item, (mentions, present) in found.items():
        wrong = len(_wrong(mentions, present))
        counts[item] = np.array(
            [len(mentions), wrong, 1, wrong > 0, len(present), len(present & set(mentions))]
        )
    return counts


def _wrong(mentions: list[str], present: set[str]) -> list[str]:
    return [name for name in mentions if name not in present]


def _mentions(text: str, names: Mapping[str, str], is_own: bool) -> list[str]:
    """Return the objects that a text mentions, see `mentioned_objects`; `names`: COCO name of each phrase."""
    # Punctuation marks are words of their own, so that no phrase extends across them.
    joints = "-" if is_own else "-/"
    words = re.findall(rf"\w+(?:[{joints}]\w+)*|[^\w\s]", text.lower())
    found, start = [], 0
    while start < len(words):
        # the longest known phrase that starts here, of at most three words, else the single word
        for end in range(min(start + 3, len(words)), start, -1):
            phrase = " ".join(words[start:end])
            if phrase in names or end == start + 1:
                break
        # A hyphen may take the place of the space in a phrase: hot-dog.
        spaced = phrase.replace("-", " ") if is_own else phrase
        found.append((phrase, names.get(phrase) or names.get(spaced, NO_OBJECT)))
        start = end
    if any(phrase in _TOILETS for phrase, _ in found):
        found = [(phrase, name) for phrase, name in found if phrase not in ("seat", "seats")]
    return [name for _, name in found if name != NO_OBJECT]


def own_synonyms() -> dict[str, list[str]]:
    """Return coco_objects.json: COCO's 80 names and NO_OBJECT, each with its synonyms."""
    return json.loads(Path(__file__).with_name("coco_objects.json").read_text(encoding="utf-8"))


@cache
def _own_names() -> dict[str, str]:
    return _names(own_synonyms())


def _names(synonyms: Synonyms) -> dict[str, str]:
    """Return the COCO name of each phrase, plurals included."""
    names = {}
    for name, others in synonyms.items():
        names |= dict.fromkeys([name.lower(), *(other.lower() for other in others)], name)
    for phrase, word in _QUALIFIED.items():
        names[phrase] = names.get(word, NO_OBJECT)
    # A word with an entry of its own is not taken for a plural of another.
    plurals = {}
    for phrase, name in names.items():
        plurals |= dict.fromkeys(_plurals(phrase), name)
    return plurals | names


def _plurals(phrase: str) -> list[str]:
    """Return possible plurals of a phrase; one that does not exist does no harm."""
    plurals = [phrase + "s"]
    if re.search(r"(?:[sxzo]|ch|sh)$", phrase):
        plurals.append(phrase + "es")
    if re.search(r"[^aeiou]y$", phrase):
        plurals.append(phrase[:-1] + "ies")
    endings = [singular for singular in _IRREGULAR if phrase.endswith(singular)]
    return plurals + [phrase.removesuffix(singular) + _IRREGULAR[singular] for singular in endings]


def _name_of(name: str, names: Mapping[str, str], item: Hashable) -> str:
    """Return the COCO name of an object of an item. Raises ValueError for an unknown one."""
    found = names.get(text_of(name, f"objects of {item!r}").lower())
    if found is None:
        raise ValueError(f"objects of {item!r}: {name!r} has no entry in the synonyms")
    return found


def _listed(values: Iterable[str], item: Hashable) -> Iterable[str]:
    # A single text is refused: its letters would be taken for objects.
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(
            f"objects of {item!r}: found {values!r}; expected a list of names, which may be empty"
        )
    return values
