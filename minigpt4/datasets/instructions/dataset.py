"""From a record of an official file to a sample for the model: one class for all datasets, which differ by their Task."""

import hashlib
import random
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4.common.image_files import find_file, same_file
from minigpt4.common.utils import printable
from minigpt4.datasets.datasets.annotations import Fault
from minigpt4.datasets.datasets.image_text_dataset import ImageTextDataset, file_below
from minigpt4.datasets.datasets.record_text import without_image_mark
from minigpt4.datasets.datasets.skips import SkipSample
from minigpt4.datasets.instructions.dialogues import CONNECT
from minigpt4.datasets.instructions.pools import SLOT
from minigpt4.datasets.instructions.records import GUIDE, Box, Example, Records
from minigpt4.processors import ImageError, load_rgb

IMAGE = "<Img><ImageHere></Img>"


class Task(NamedTuple):
    """How a record becomes an instruction and an answer."""

    tag: str = ""  # task identifier, such as [vqa]
    pool: str | None = None  # of templates; None: the instruction is the record's question
    takes_words: bool = True  # each template has a place for the record's question
    cleans_question: bool = False  # the text processor is applied to questions
    cleans_answer: bool = False  # and to answers
    is_inverse: bool = False  # questions and answers are swapped
    is_dialogue: bool = False  # a record's questions and answers are the turns of one sample


class InstructionDataset(ImageTextDataset):
    """`dataset[i]` -> "instruction_input" and "answer" of record i, or the turns "conv_q", "conv_a", "connect_sym".

    A sample also has "image", or "images": [] for text alone, "sample_id", and "image_id" and "question_id" if the format
    has them. A question, an answer and a template of the `pool` are drawn, seeded by the run's seed, epoch and record,
    so they depend neither on rank nor on worker. Boxes are clipped to the image; with `exact_boxes` they are as the
    release writes them, also outside of 0..100. Source: MiniGPT-v2.
    """

    guide = GUIDE
    load_image = staticmethod(load_rgb)

    def __init__(
        self,
        annotation: Records,
        task: Task,
        folders: Sequence[Path],
        vis_processor: Any,
        text_processor: Callable[[str], str] | None = None,
        name: str = "instructions",
        pool: Sequence[str] = (SLOT,),
        exact_boxes: bool = False,
    ):
        self.task, self.exact_boxes = task, exact_boxes
        self.folders, self.pool = list(folders), list(pool)
        super().__init__(
            annotation, folders[0] if folders else "", vis_processor, text_processor, name
        )

    def load(self, record: Example | Fault, epoch: int) -> dict:
        if isinstance(record, Fault):
            raise SkipSample(record.reason, record.detail)
        label = self.label_of(record)
        sample, size = self._image(record, epoch)
        if self.task.is_dialogue:
            sample |= self._dialogue(record)
        else:
            rng = random.Random(f"{self.place.seed}/{epoch}/{label}")
            sample |= self._single_turn(record, rng, size)
        ids = {"image_id": record.image_id, "question_id": record.question_id}
        sample |= {key: value for key, value in ids.items() if value is not None}
        return sample | {"sample_id": printable(label, 1000)}

    @cached_property
    def fingerprint(self) -> str:
        """As in BaseDataset, but without a list's brackets and commas, which checkpoints rely on."""
        digest = hashlib.blake2b(digest_size=8)
        for record in self.annotation:
            digest.update(repr(record).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def label_of(self, record: Example | Fault) -> str:
        return str(record.where)

    def image_of(self, record: Example | Fault) -> str:
        has_image = isinstance(record, Example) and record.image is not None
        return same_file(record.image) if has_image else self.label_of(record)

    def _image(self, record: Example, epoch: int) -> tuple[dict, tuple[int, int]]:
        """Return (the image keys of the sample, (width, height) of the file's image in pixels). Raises SkipSample."""
        if record.image is None:
            return {"images": []}, (0, 0)
        try:
            image = self.load_image(find_image(self.folders, record.image))
        except (ImageError, OSError) as error:
            raise SkipSample("bad_image", str(error)) from error
        return self.processed(image, epoch, self.label_of(record)), image.size

    def _single_turn(self, record: Example, rng: random.Random, size: tuple[int, int]) -> dict:
        """Return one instruction and its answer; the image precedes the instruction."""
        task = self.task
        questions, answers = record.questions, record.answers
        if task.is_inverse:
            questions, answers = answers, questions
        # the order of the draws is part of the samples' reproducibility
        question = self._text(rng.choice(questions), size, task.cleans_question)
        instruction = rng.choice(self.pool).replace(SLOT, without_image_mark(question))
        answer = self._text(rng.choice(answers), size, task.cleans_answer)
        if record.image is not None:
            instruction = f"{' '.join(filter(None, (IMAGE, task.tag, instruction)))} "
        return {"instruction_input": instruction, "answer": answer}

    def _dialogue(self, record: Example) -> dict:
        """Return the turns, joined; the image precedes the first question."""
        first, *others = record.questions
        questions = [f"{IMAGE} {first} ", *(f"{question} " for question in others)]
        return {
            "conv_q": CONNECT.join(questions),
            "conv_a": CONNECT.join(record.answers),
            "connect_sym": CONNECT,
        }

    def _text(self, words: str | Box, size: tuple[int, int], is_cleaned: bool) -> str:
        if isinstance(words, Box):
            return box_text(words, size, self.exact_boxes)
        return self.processed_text(words) if is_cleaned else words


def find_image(folders: Sequence[Path], name: str) -> Path:
    """Return the path of the image `name` in the first folder that has it. Raises SkipSample if none has."""
    home = next((folder for folder in folders[:-1] if find_file(folder, name)), folders[-1])
    return file_below(home, name)


def box_text(box: Box, size: tuple[int, int], is_exact: bool = False) -> str:
    """Return a box as {<x0><y0><x1><y1>}, in integers (truncated) of 0..100; `size`: (width, height) of the image file.

    A box is clipped to the image, except with `is_exact`. Raises SkipSample if its annotation is for an image of another
    size, or if it lies completely outside of the image. Source: MiniGPT-v2.
    """
    if box.size not in (None, size):
        sizes = (
            f"the image has {size[0]}x{size[1]} pixels, its annotation {box.size[0]}x{box.size[1]}"
        )
        raise SkipSample("bad_image", f"{sizes}: its box would be wrong; use the original images")
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    # divided before multiplied, as the release does: with exact hundredths, the rounding error decides the result
    hundredths = [int(corner / size[axis % 2] * 100) for axis, corner in enumerate(corners)]
    if corners[0] >= size[0] or corners[1] >= size[1] or corners[2] <= 0 or corners[3] <= 0:
        outside = f"the box {list(box[:4])} lies outside of the image of {size[0]}x{size[1]} pixels"
        raise SkipSample("bad_record", outside)
    if not is_exact:
        hundredths = [min(max(number, 0), 100) for number in hundredths]
    return "{" + "".join(f"<{number}>" for number in hundredths) + "}"
