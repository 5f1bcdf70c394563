"""Dialogues of several questions about one image, for the training of the small MiniGPT-v2, in LLaVA's format.

The model reads an image once for all questions about it, so that a training of minutes sees several times as many answers
as with one question per sample. Each object is asked about once: no answer can be copied from an earlier turn.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from minigpt4.common.config_paths import find_path
from minigpt4.datasets.instructions.dataset import box_text
from minigpt4.datasets.instructions.pools import SLOT, pool_path, read_pool
from minigpt4.datasets.instructions.records import Box
from minigpt4.quickstart import world
from minigpt4.quickstart.questions import Question, about, questions

Boxes = Sequence[tuple[int, int, int, int]]
# drawn from evenly, so half of the questions ask for a box
TASKS = ("refer", "refer", "identify", "vqa")
SIZE = (world.IMAGE_SIZE, world.IMAGE_SIZE)


def pools() -> dict[str, list[str]]:
    """Return {task: instruction templates}, those of the datasets with one question per sample."""
    return {task: read_pool(find_path(pool_path(task)), True) for task in sorted(set(TASKS))}


def dialogue(
    name: str,
    scene: world.Scene,
    boxes: Boxes,
    sentences: dict[str, list[str]],
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Return a LLaVA record for image COCO_train2014_<name>: one question about each object, in random order.

    `sentences`: what `pools` returns.
    """
    turns = []
    for k in rng.permutation(len(scene.objects)):
        task = TASKS[rng.integers(len(TASKS))]
        words, answer = _exchange(task, scene, boxes, k, rng)
        sentence = sentences[task][rng.integers(len(sentences[task]))].replace(SLOT, words)
        image_slot = "" if turns else "<image>\n"  # before the first question only
        turns.append({"from": "human", "value": f"{image_slot}[{task}] {sentence}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": name, "conversations": turns}


def _exchange(
    task: str, scene: world.Scene, boxes: Boxes, k: int, rng: np.random.Generator
) -> tuple[str, str]:
    """Return what to put into the template of `task` to ask about object k, and the answer."""
    item = scene.objects[k]
    phrase, box = f"{item.colour} {item.shape}", box_text(Box(*boxes[k]), SIZE)
    if task == "refer":
        return phrase, box
    if task == "identify":
        return box, phrase
    question = _question(scene, item, rng)
    return question.taught(rng), question.answer


def _question(scene: world.Scene, item: world.Object, rng: np.random.Generator) -> Question:
    """Return a random question: about `item` in a crowded scene, about anything in the others. Its kind is drawn first."""
    is_crowded = len(scene.objects) > world.MAX_OBJECTS  # there are no words for so many objects
    possible = list(about(item, scene)) if is_crowded else questions(scene)
    kinds = sorted({question.kind for question in possible})
    kind = kinds[rng.integers(len(kinds))]
    of_kind = [question for question in possible if question.kind == kind]
    return of_kind[rng.integers(len(of_kind))]
