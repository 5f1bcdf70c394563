"""A record of an official file -> the sample that the model reads: one class for all sets, a Task says what differs."""

import hashlib
import random
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4.common.image_files import find_file
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
    """What stands around the words of a record, and which of them the text processor cleans."""

    tag: str = ""  # task identifier, such as [vqa]
    pool: str | None = None  # of sentences; None: the words alone
    takes_words: bool = True  # each sentence has a place for the record's own words
    cleans_question: bool = False
    cleans_answer: bool = False
    is_inverse: bool = False  # asks by what others answer
    is_dialogue: bool = False  # all questions and answers are its turns


class InstructionDataset(ImageTextDataset):
    """`dataset[i]` -> "instruction_input" and "answer" of record i, or the turns "conv_q", "conv_a", "connect_sym".

    Beside them "image", or "images": [] for text alone, "sample_id", and "image_id", "question_id" where the format has
    them. Of several sentences, answers and lines of the `pool` one is drawn, by seed, epoch and record: the same in
    every run, on whichever rank and worker. Boxes are cut to the image; with `exact_boxes` they are as the release
    writes them, also beyond 0..100. Source: MiniGPT-v2.
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
        draw = random.Random(f"{self.place.seed}/{epoch}/{label}")
        sample |= (
            self._dialogue(record) if self.task.is_dialogue else self._exchange(record, draw, size)
        )
        ids = {"image_id": record.image_id, "question_id": record.question_id}
        sample |= {key: value for key, value in ids.items() if value is not None}
        return sample | {"sample_id": printable(label, 1000)}

    @cached_property
    def fingerprint(self) -> str:
        """As in BaseDataset, record by record: the text of millions of them at once would take gigabytes."""
        digest = hashlib.blake2b(digest_size=8)
        for record in self.annotation:
            digest.update(repr(record).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def label_of(self, record: Example | Fault) -> str:
        return str(record.where)

    def image_of(self, record: Example | Fault) -> str:
        is_about_one = isinstance(record, Example) and record.image is not None
        return record.image if is_about_one else self.label_of(record)

    def _image(self, record: Example, epoch: int) -> tuple[dict, tuple[int, int]]:
        """Return (what the sample has of the image, its width and height in pixels). Raises SkipSample."""
        if record.image is None:
            return {"images": []}, (0, 0)
        try:
            image = self.load_image(find_image(self.folders, record.image))
        except (ImageError, OSError) as error:
            raise SkipSample("bad_image", str(error)) from error
        return self.processed(image, epoch, self.label_of(record)), image.size

    def _exchange(self, record: Example, draw: random.Random, size: tuple[int, int]) -> dict:
        """Return one instruction and its answer."""
        task = self.task
        asked, said = record.questions, record.answers
        if task.is_inverse:
            asked, said = said, asked
        words = self._words(draw.choice(asked), size, task.cleans_question)
        sentence = draw.choice(self.pool).replace(SLOT, without_image_mark(words))
        answer = self._words(draw.choice(said), size, task.cleans_answer)
        if record.image is not None:
            sentence = f"{' '.join(filter(None, (IMAGE, task.tag, sentence)))} "
        return {"instruction_input": sentence, "answer": answer}

    def _dialogue(self, record: Example) -> dict:
        """Return the turns, joined; the image stands before the first."""
        first, *others = record.questions
        questions = [f"{IMAGE} {first} ", *(f"{question} " for question in others)]
        return {
            "conv_q": CONNECT.join(questions),
            "conv_a": CONNECT.join(record.answers),
            "connect_sym": CONNECT,
        }

    def _words(self, said: str | Box, size: tuple[int, int], is_cleaned: bool) -> str:
        if isinstance(said, Box):
            return box_text(said, size, self.exact_boxes)
        text = self.text_processor(said) if is_cleaned and self.text_processor else said
        if said and not text.strip():
            raise SkipSample("bad_caption", f"the text processor leaves nothing of {said!r:.60}")
        return text


def find_image(folders: Sequence[Path], name: str) -> Path:
    """Return the image of that name in the first folder that has it. Raises SkipSample without one."""
    home = next((folder for folder in folders[:-1] if find_file(folder, name)), folders[-1])
    return file_below(home, name)


def box_text(box: Box, size: tuple[int, int], is_exact: bool = False) -> str:
    """Return a box as {<x0><y0><x1><y1>} in 0..100, truncated; `size`: width and height of the image as it was opened.

    What lies outside of the image is cut off, or written as it is with `is_exact`. Raises SkipSample for a box of an
    image of another size, and for one that lies wholly outside. Source: MiniGPT-v2.
    """
    if box.size not in (None, size):
        widths = (
            f"the image has {size[0]}x{size[1]} pixels, its annotation {box.size[0]}x{box.size[1]}"
        )
        raise SkipSample("bad_image", f"{widths}: its box would be wrong; use the original images")
    corners = (box.left, box.top, box.left + box.width, box.top + box.height)
    # first divided, then multiplied, as the release does: the order decides what whole hundredths are truncated to
    hundredths = [int(corner / size[axis % 2] * 100) for axis, corner in enumerate(corners)]
    if corners[0] >= size[0] or corners[1] >= size[1] or corners[2] <= 0 or corners[3] <= 0:
        outside = f"the box {list(box[:4])} lies outside of the image of {size[0]}x{size[1]} pixels"
        raise SkipSample("bad_record", outside)
    if not is_exact:
        hundredths = [min(max(number, 0), 100) for number in hundredths]
    return "{" + "".join(f"<{number}>" for number in hundredths) + "}"
