"""Put scenes into words: short noisy captions for stage 1, long descriptions for stage 2."""

import numpy as np

from minigpt4.quickstart.world import CELLS, Object, Scene

NUMBERS = ("one", "two", "three")
BACKGROUND_PHRASES = {
    "gray": "on a gray background",
    "beige": "on a beige background",
    "light blue": "on a light blue background",
    "striped": "on a striped background",
    "checkered": "on a checkered background",
    "grass": "on green grass",
    "night sky": "in a night sky",
    "brick wall": "on a brick wall",
}
CELL_PHRASES = {
    cell: {"left": "on the left", "right": "on the right", "center": "in the center"}.get(
        cell, f"at the {cell}"
    )
    for cell in CELLS
}
FACTS_PER_CAPTION = 4
INVERSE = {"above": "below", "to the left of": "to the right of"}


def count_phrase(scene: Scene) -> str:
    """Return 'one object', 'two objects' or 'three objects'."""
    number = len(scene.objects)
    return f"{NUMBERS[number - 1]} object{'s' if number > 1 else ''}"


def name_of(item: Object, scene: Scene) -> str:
    """Return an object's shape ('circle'), with its colour ('red circle') if another object has the same shape."""
    is_only_one = all(o is item or o.shape != item.shape for o in scene.objects)
    return item.shape if is_only_one else f"{item.colour} {item.shape}"


def relations(scene: Scene) -> list[tuple[Object, str, Object]]:
    """Return (object, 'above' or 'to the left of', the next object in reading order) for each object but the last."""
    pairs = zip(scene.objects, scene.objects[1:], strict=False)
    return [(a, "to the left of" if a.row == b.row else "above", b) for a, b in pairs]


def facts(scene: Scene) -> list[str]:
    """Return single statements: about the whole scene, about each object, about neighbours in reading order."""
    article = "a " if scene.background in ("night sky", "brick wall") else ""
    verb = "are" if len(scene.objects) > 1 else "is"
    result = [
        f"there {verb} {count_phrase(scene)}",
        f"the background is {article}{scene.background}",
    ]
    for item in scene.objects:
        name = name_of(item, scene)
        result += [
            f"the {name} is {what}" for what in (item.colour, item.size, CELL_PHRASES[item.cell])
        ]
        if sum(o.colour == item.colour for o in scene.objects) == 1:
            result.append(f"the {item.colour} object is a {item.shape}")
    for first, relation, second in relations(scene):
        first, second = name_of(first, scene), name_of(second, scene)
        result += [
            f"the {first} is {relation} the {second}",
            f"the {second} is {INVERSE[relation]} the {first}",
        ]
    return result


def list_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a terse caption, some words left out: 'two objects, striped, small red circle top left, star right'."""
    parts = [count_phrase(scene)] + [scene.background] * (rng.random() < 0.9)
    for item in scene.objects:
        words = [word for word in (item.size, item.colour) if rng.random() < 0.95]
        parts.append(" ".join([*words, item.shape, item.cell]))
    return ", ".join(parts)


def fact_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a few facts in random order, separated by commas as captions on the web often are."""
    return ", ".join(rng.permutation(facts(scene))[:FACTS_PER_CAPTION])


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """Return sentences about everything in the scene, from which `parse` recovers it."""
    opening = ("The image shows", "This picture shows", "The picture contains")[rng.integers(3)]
    sentences = [f"{opening} {count_phrase(scene)} {BACKGROUND_PHRASES[scene.background]}."]
    sentences += [
        f"A {o.size} {o.colour} {o.shape} is {CELL_PHRASES[o.cell]}." for o in scene.objects
    ]
    if len(scene.objects) == 2:
        ((first, relation, second),) = relations(scene)
        sentences.append(f"The {name_of(first, scene)} is {relation} the {name_of(second, scene)}.")
    return " ".join(sentences)
