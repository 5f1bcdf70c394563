"""The drawn world in the official files that MiniGPT-v2 trains and is evaluated on; nothing is there twice.

Below `<env.cache_root>/embedded/instructions-v<VERSION>/`:

    images/COCO_train2014_<12 digits>.jpg          drawn images, those for evaluation last
    refcoco/refs(unc).p, refcoco/instances.json    phrases and boxes as REFER has them; split "val" is for evaluation
    gqa/train_balanced_questions.json              questions in the words of stage 2, with answers of a word or two
    coco_caption/coco_karpathy_train.json          terse captions of images with few objects
    flickr/groundedcaption.json                    phrases with their boxes, of each object of an image
    multitask/multi_task_conversation.json         of each image of training, a question about each object in one row
    evaluation/refcoco_val.json                    phrases and boxes as eval_ref.py reads them
    evaluation/identify.jsonl                      the same boxes, asked what they hold
    evaluation/testdev_balanced_questions.json     questions in words that no training shows, as GQA has them
"""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from minigpt4.datasets.instructions.dataset import box_text
from minigpt4.datasets.instructions.records import Box
from minigpt4.quickstart import conversations, world
from minigpt4.quickstart.language import list_caption
from minigpt4.quickstart.prepare import encode, written
from minigpt4.quickstart.questions import draw_question

VERSION = 2  # raise it when images or texts change: what is prepared is used again
NUM_IMAGES = {"train": 3000, "crowded": 3000, "val": 200}
SPLITS = {"train": "stage1", "crowded": "stage1", "val": "held_out"}  # of the drawn world
CROWD = (4, 6)  # objects of a crowded image, least and most: more answers in a row
QUESTIONS = 2  # about each image of training
SIZE = (world.IMAGE_SIZE, world.IMAGE_SIZE)


class Drawn(NamedTuple):
    """An image of RefCOCO's split `split`, its number over all splits, and the boxes of its objects in pixels."""

    split: str
    index: int
    number: int
    scene: world.Scene
    boxes: list[tuple[int, int, int, int]]

    @property
    def name(self) -> str:
        return f"COCO_train2014_{self.number:012}"

    def phrase(self, k: int) -> str:
        """Return the words for object k: no two objects of an image share colour and shape."""
        return f"{self.scene.objects[k].colour} {self.scene.objects[k].shape}"


def write_instructions(folder: Path) -> Path:
    """Return `folder` with the files above, written if absent."""

    def write(scratch: Path, progress: tqdm) -> None:
        drawn = list(draw_images(scratch / "images", progress))
        training = [image for image in drawn if image.split != "val"]
        held_out = [image for image in drawn if image.split == "val"]
        _write_refer(scratch / "refcoco", drawn)
        _write_json(scratch / "gqa/train_balanced_questions.json", list(_asked(training)))
        _write_json(scratch / "multitask/multi_task_conversation.json", _dialogues(training))
        _write_json(scratch / "coco_caption/coco_karpathy_train.json", list(_captions(training)))
        _write_json(scratch / "flickr/groundedcaption.json", list(_grounded_captions(training)))
        evaluation = scratch / "evaluation"
        _write_json(evaluation / "refcoco_val.json", [_refer_row(image) for image in held_out])
        _write_json(
            evaluation / "testdev_balanced_questions.json", dict(map(_question_row, held_out))
        )
        lines = [json.dumps(_identify_row(image)) + "\n" for image in held_out]
        (evaluation / "identify.jsonl").write_text("".join(lines))

    return written(folder, write, sum(NUM_IMAGES.values()))


def draw_images(folder: Path, progress: tqdm) -> Iterator[Drawn]:
    """Draw the images of all splits into `folder`, and yield what is in them."""
    folder.mkdir(parents=True)
    number = 0
    for split, count in NUM_IMAGES.items():
        for index in range(count):
            # one stream of random numbers an image, of whichever kind it is
            drawing = (
                world.draw(SPLITS[split], number, CROWD)
                if split == "crowded"
                else world.draw(SPLITS[split], index)
            )
            number += 1
            drawn = Drawn(split, index, number, drawing[0], world.boxes(drawing[0], drawing[2]))
            (folder / f"{drawn.name}.jpg").write_bytes(encode(drawing[1]))
            progress.update()
            yield drawn


def _write_refer(folder: Path, drawn: list[Drawn]) -> None:
    """Write REFER's two files: a ref and an annotation for each object, with the same number."""
    images = []
    annotations, refs = [], []
    for image in drawn:
        size = {"width": SIZE[0], "height": SIZE[1]}
        images.append({"id": image.number, "file_name": f"{image.name}.jpg", **size})
        for k, box in enumerate(image.boxes):
            ids = {"image_id": image.number, "ann_id": len(refs)}
            annotations.append({"id": len(refs), "image_id": image.number, "bbox": list(box)})
            phrase = {"raw": image.phrase(k), "sent": image.phrase(k)}
            split = "val" if image.split == "val" else "train"
            refs.append({"ref_id": len(refs), **ids, "split": split, "sentences": [phrase]})
    _write_json(folder / "instances.json", {"images": images, "annotations": annotations})
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))


def _asked(training: list[Drawn]) -> Iterator[dict[str, str]]:
    """Yield the questions about images of training, in the words of stage 2; the kinds take turns.

    Crowded images are left out: there are no words for their number of objects.
    """
    for image in training:
        if image.split == "crowded":
            continue
        rng = world.generator(SPLITS[image.split], image.index).spawn(1)[0]
        for turn in range(QUESTIONS):
            question = draw_question(image.scene, image.index * QUESTIONS + turn)
            yield {
                "image": f"{image.name}.jpg",
                "question": question.taught(rng),
                "answer": question.answer,
            }


def _captions(training: list[Drawn]) -> Iterator[dict[str, str]]:
    """Yield a terse caption of each image of few objects, as the first quickstart's stage 1 has them."""
    for image in training:
        if image.split == "crowded":
            continue
        rng = world.generator(SPLITS[image.split], image.index).spawn(3)[2]
        yield {"image": f"{image.name}.jpg", "caption": list_caption(image.scene, rng)}


def _grounded_captions(training: list[Drawn]) -> Iterator[dict[str, str]]:
    """Yield the phrases of an image's objects in reading order, each with its box."""
    for image in training:
        parts = [
            f"<p>{image.phrase(k)}</p> {box_text(Box(*box), SIZE)}"
            for k, box in enumerate(image.boxes)
        ]
        yield {"image_id": image.name, "grounded_caption": ", ".join(parts)}


def _dialogues(training: list[Drawn]) -> list[dict[str, Any]]:
    """Return the rows of several questions, those of an image drawn by its own random numbers."""
    rows, sentences = [], conversations.pools()
    for image in training:
        rng = world.generator(SPLITS[image.split], image.number).spawn(2)[1]
        name = f"{image.number:012}"
        rows.append(conversations.dialogue(name, image.scene, image.boxes, sentences, rng))
    return rows


def _asked_object(image: Drawn) -> int:
    """Return which object of an image for evaluation is asked about: they take turns."""
    return image.index % len(image.boxes)


def _refer_row(image: Drawn) -> dict[str, Any]:
    k = _asked_object(image)
    size = {"width": SIZE[0], "height": SIZE[1]}
    return {
        "img_id": f"{image.name}_{k}",
        "sents": image.phrase(k),
        "bbox": list(image.boxes[k]),
        **size,
    }


def _identify_row(image: Drawn) -> dict[str, Any]:
    k = _asked_object(image)
    question = f"[identify] what is this {box_text(Box(*image.boxes[k]), SIZE)}"
    return {
        "id": image.name,
        "image": f"{image.name}.jpg",
        "question": question,
        "answer": image.phrase(k),
    }


def _question_row(image: Drawn) -> tuple[str, dict[str, Any]]:
    question = draw_question(image.scene, image.index)
    row = {"imageId": image.name, "question": question.text, "answer": question.answer}
    return str(image.number), row | {"types": {"structural": question.kind}}


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
