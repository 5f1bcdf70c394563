"""Write the drawn world in the official file formats on which MiniGPT-v2 is trained and evaluated.

Below `<env.cache_root>/embedded/instructions-v<VERSION>/`:

    images/COCO_train2014_<12 digits>.jpg          drawn images, the held-out ones last
    refcoco/refs(unc).p, refcoco/instances.json    phrases and boxes in REFER's format; split "val" is held out
    gqa/train_balanced_questions.json              questions in the words of stage 2, with answers of a word or two
    coco_caption/coco_karpathy_train.json          terse captions of images with few objects
    flickr/groundedcaption.json                    for each training image the phrases of all objects with their boxes
    multitask/multi_task_conversation.json         for each training image a dialogue: one question about each object
    evaluation/refcoco_val.json                    phrases and boxes as eval_ref.py reads them
    evaluation/identify.jsonl                      the same boxes, to ask what they hold
    evaluation/testdev_balanced_questions.json     questions in words that training never shows, in GQA's format
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

VERSION = 2  # raise it when images or texts change: existing files are reused
NUM_IMAGES = {"train": 3000, "crowded": 3000, "val": 200}
SPLITS = {"train": "stage1", "crowded": "stage1", "val": "held_out"}  # of the drawn world
CROWD = (4, 6)  # least and most objects of a crowded image: it gives more answers per sample
QUESTIONS = 2  # about each training image
SIZE = (world.IMAGE_SIZE, world.IMAGE_SIZE)


class Drawn(NamedTuple):
    """A drawn image: its key in NUM_IMAGES, its number there (from 0) and over all (from 1), and its boxes in pixels."""

    split: str
    index: int
    number: int
    scene: world.Scene
    boxes: list[tuple[int, int, int, int]]

    @property
    def name(self) -> str:
        return f"COCO_train2014_{self.number:012}"

    def phrase(self, k: int) -> str:
        """Return the words for object k, which are unambiguous: no two objects of an image share colour and shape."""
        return f"{self.scene.objects[k].colour} {self.scene.objects[k].shape}"


def write_instructions(folder: Path) -> Path:
    """Write the files above to `folder`, if absent; return `folder`."""

    def write(scratch: Path, progress: tqdm) -> None:
        drawn = list(draw_images(scratch / "images", progress))
        training = [image for image in drawn if image.split != "val"]
        held_out = [image for image in drawn if image.split == "val"]
        _write_refer(scratch / "refcoco", drawn)
        _write_json(scratch / "gqa/train_balanced_questions.json", list(_questions(training)))
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
    """Draw the images of all splits into `folder`, and yield their contents."""
    folder.mkdir(parents=True)
    number = 0
    for split, count in NUM_IMAGES.items():
        for index in range(count):
            # both kinds of training images are of split stage1: no index may occur twice
            if split == "crowded":
                scene, *maps = world.draw(SPLITS[split], number, CROWD)
            else:
                scene, *maps = world.draw(SPLITS[split], index)
            image, object_map = maps
            number += 1
            drawn = Drawn(split, index, number, scene, world.boxes(scene, object_map))
            (folder / f"{drawn.name}.jpg").write_bytes(encode(image))
            progress.update()
            yield drawn


def _write_refer(folder: Path, drawn: list[Drawn]) -> None:
    """Write REFER's two files: for each object a ref and an annotation, with the same id."""
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


def _questions(training: list[Drawn]) -> Iterator[dict[str, str]]:
    """Yield questions about training images, in the words of stage 2; the kinds of questions alternate.

    Crowded images are left out: there are no words for so many objects.
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
    """Yield a terse caption of each training image that is not crowded, as in stage 1 of quickstart.py."""
    for image in training:
        if image.split == "crowded":
            continue
        rng = world.generator(SPLITS[image.split], image.index).spawn(3)[2]
        yield {"image": f"{image.name}.jpg", "caption": list_caption(image.scene, rng)}


def _grounded_captions(training: list[Drawn]) -> Iterator[dict[str, str]]:
    """Yield for each image the phrases of its objects in reading order, each with its box."""
    for image in training:
        parts = [
            f"<p>{image.phrase(k)}</p> {box_text(Box(*box), SIZE)}"
            for k, box in enumerate(image.boxes)
        ]
        yield {"image_id": image.name, "grounded_caption": ", ".join(parts)}


def _dialogues(training: list[Drawn]) -> list[dict[str, Any]]:
    """Return a dialogue about each training image, drawn from the image's own random numbers."""
    rows, sentences = [], conversations.pools()
    for image in training:
        rng = world.generator(SPLITS[image.split], image.number).spawn(2)[1]
        name = f"{image.number:012}"
        rows.append(conversations.dialogue(name, image.scene, image.boxes, sentences, rng))
    return rows


def _asked_object(image: Drawn) -> int:
    """Return the index of the object about which the evaluation asks; over successive images the positions alternate."""
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
