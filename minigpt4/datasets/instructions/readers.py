"""One function per format: captions, questions with answers, grounded phrases, instructions without an image.

Each takes a row of the official file and yields its Examples; the formats are defined at the end.
"""

import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from minigpt4.datasets.datasets.skips import SkipSample
from minigpt4.datasets.instructions.records import Example, Format, Spot, id_of, text_of, texts_of

NO_WORDS = ("",)  # no question: the instruction is a template of the pool alone
_BOX = re.compile(r"\{[^{}]*\}")  # anything in braces, well-formed or not
_CORNERS = re.compile(r"\{<(\d+)><(\d+)><(\d+)><(\d+)>\}")


def _coco_caption(row: dict, spot: Spot) -> Iterator[Example]:
    """Skips images of COCO's val2014: Karpathy's training file lists them too, and the release leaves them out."""
    image = text_of(row, "image")
    if "train" in image:
        yield Example(spot, PurePosixPath(image).name, NO_WORDS, (text_of(row, "caption"),))


def _textcaps(row: dict, spot: Spot) -> Iterator[Example]:
    yield Example(spot, f"{id_of(row, 'image_id')}.jpg", NO_WORDS, (text_of(row, "caption_str"),))


def _vqa(row: dict, spot: Spot) -> Iterator[Example]:
    image = PurePosixPath(text_of(row, "image")).name
    question, answers = (text_of(row, "question"),), texts_of(row, "answer")
    yield Example(spot, image, question, answers, question_id=id_of(row, "question_id"))


def _aok_vqa(row: dict, spot: Spot) -> Iterator[Example]:
    image = PurePosixPath(text_of(row, "image")).name
    yield Example(spot, image, (text_of(row, "question"),), texts_of(row, "direct_answers"))


def _gqa(row: dict, spot: Spot) -> Iterator[Example]:
    yield Example(
        spot, text_of(row, "image"), (text_of(row, "question"),), (text_of(row, "answer"),)
    )


def _ocr_vqa(row: dict, spot: Spot) -> Iterator[Example]:
    """A row is a book cover with several questions; of the splits 1 (train), 2 (validation), 3 (test), only 1 is used."""
    if id_of(row, "split") != 1:
        return
    image = f"{spot.row}{PurePosixPath(text_of(row, 'imageURL')).suffix}"
    questions, answers = texts_of(row, "questions"), texts_of(row, "answers")
    if len(questions) != len(answers):
        raise SkipSample("bad_record", f"has {len(questions)} questions and {len(answers)} answers")
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        where = Spot(spot.file, f"{spot.row} question {number}")
        yield Example(where, image, (question,), (answer,), image_id=spot.row)


def _grounded_caption(row: dict, spot: Spot) -> Iterator[Example]:
    yield _with_boxes(row, spot, "", text_of(row, "grounded_caption"))


def _caption_to_phrases(row: dict, spot: Spot) -> Iterator[Example]:
    yield _with_boxes(row, spot, text_of(row, "caption"), text_of(row, "output"))


def _phrase_to_boxes(row: dict, spot: Spot) -> Iterator[Example]:
    phrase = text_of(row, "phrase")
    yield _with_boxes(row, spot, phrase, f"<p>{phrase}</p> {text_of(row, 'bbox')}")


def _with_boxes(row: dict, spot: Spot, question: str, answer: str) -> Example:
    """Return the Example of an answer that contains boxes. Raises SkipSample if a box is malformed or not in 0..100."""
    boxes = _BOX.findall(answer)
    if not boxes:
        raise SkipSample("bad_record", f"no box in {answer!r:.60}; expected {{<x0><y0><x1><y1>}}")
    for box in boxes:
        match = _CORNERS.fullmatch(box)
        if not match:
            raise SkipSample(
                "bad_record", f"the box {box:.40} is none; expected {{<x0><y0><x1><y1>}}"
            )
        corners = tuple(map(int, match.groups()))  # x0, y0, x1, y1
        if max(corners) > 100 or corners[0] > corners[2] or corners[1] > corners[3]:
            raise SkipSample(
                "bad_record",
                f"the box {box} is out of range; expected 0 <= x0 <= x1 <= 100, y alike",
            )
    image_id = id_of(row, "image_id")
    return Example(spot, f"{image_id}.jpg", (question,), (answer,), image_id)


def _text_alone(row: dict, spot: Spot) -> Iterator[Example]:
    """Uses only the first of a row's instances, as the release does."""
    instances = row.get("instances")
    if not isinstance(instances, list) or not instances or not isinstance(instances[0], dict):
        raise SkipSample(
            "bad_record", f"'instances' is {instances!r:.60}; expected a list of mappings"
        )
    instance = instances[0]
    instruction = text_of(instance, "instruction_with_input")
    if instance.get("constraints") is not None:
        instruction += f" {text_of(instance, 'constraints')}"
    yield Example(spot, None, (instruction,), (text_of(instance, "output"),))


COCO_CAPTIONS = Format(
    _coco_caption, '{"image": "train2014/COCO_train2014_000000000009.jpg", "caption": text}'
)
TEXTCAPS = Format(_textcaps, '{"image_id": id, "caption_str": text}', "data")
VQA = Format(_vqa, '{"image": path, "question": text, "question_id": id, "answer": [text, ..]}')
AOK_VQA = Format(_aok_vqa, '{"image": path, "question": text, "direct_answers": [text, ..]}')
GQA = Format(_gqa, '{"image": path, "question": text, "answer": text}')
OCR_VQA = Format(
    _ocr_vqa,
    '{"split": 1, "imageURL": address, "questions": [text, ..], "answers": [text, ..]}',
    "",
)
GROUNDED_CAPTION = Format(
    _grounded_caption, '{"image_id": id, "grounded_caption": text with boxes}'
)
CAPTION_PHRASES = Format(
    _caption_to_phrases, '{"image_id": id, "caption": text, "output": text with boxes}'
)
PHRASE_BOXES = Format(
    _phrase_to_boxes, '{"image_id": id, "phrase": text, "bbox": "{<x0><y0><x1><y1>}"}'
)
TEXT_ALONE = Format(
    _text_alone, '{"instances": [{"instruction_with_input": text, "output": text}]}'
)
