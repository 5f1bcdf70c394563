"""LLaVA's conversations: the first question and answer alone, or all turns."""

from collections.abc import Iterator

from minigpt4.datasets.datasets.record_text import (
    ROLES,
    message_parts,
    whole_text,
    without_image_mark,
)
from minigpt4.datasets.datasets.skips import SkipSample
from minigpt4.datasets.instructions.records import Example, Format, Spot, id_of

CONNECT = "!@#"  # joins the turns of a sample; the model splits there. Source: MiniGPT-v2
_EXPECTED = '{"id": "000000000009", "conversations": [{"from": "human", "value": text}, {"from": "gpt", ..}, ..]}'


def _first_turn(row: dict, spot: Spot) -> Iterator[Example]:
    questions, answers = _turns(row)
    yield _example(row, spot, questions[:1], answers[:1])


def _all_turns(row: dict, spot: Spot) -> Iterator[Example]:
    questions, answers = _turns(row)
    for text in (*questions, *answers):
        if CONNECT in text:
            raise SkipSample(
                "bad_record", f"has {CONNECT} in a text, which stands between turns: {text!r:.60}"
            )
    yield _example(row, spot, questions, answers)


def _example(row: dict, spot: Spot, questions: list[str], answers: list[str]) -> Example:
    image_id = id_of(row, "id")
    return Example(
        spot, f"COCO_train2014_{image_id}.jpg", tuple(questions), tuple(answers), image_id
    )


def _turns(row: dict) -> tuple[list[str], list[str]]:
    """Return (questions, answers) as they stand, but without the mark of the image; equally many.

    A last question without an answer has nothing to be learnt, and is left out. Raises SkipSample.
    """
    messages = row.get("conversations")
    if not isinstance(messages, list) or len(messages) < 2:
        found = (
            f"{len(messages)} messages" if isinstance(messages, list) else type(messages).__name__
        )
        raise SkipSample(
            "bad_record", f"'conversations' has {found}; expected a question and an answer in turn"
        )
    spoken: tuple[list[str], list[str]] = ([], [])
    for number, message in enumerate(messages[: len(messages) // 2 * 2]):
        who, text = message_parts(message)
        if ROLES.get(who if isinstance(who, str) else None) != number % 2 or not isinstance(
            text, str
        ):
            role = ("human", "gpt")[number % 2]
            expected = f'{{"from": "{role}", "value": text}}'
            raise SkipSample(
                "bad_record", f"message {number} is {message!r:.60}; expected {expected}"
            )
        text = whole_text(text) if number % 2 else without_image_mark(whole_text(text))
        if number == 0:
            # as the release does: the line end beside the mark
            text = text.replace("\n", "").strip()
        if not text.strip():
            raise SkipSample("bad_caption", f"message {number} is empty")
        spoken[number % 2].append(text)
    return spoken


FIRST_TURN = Format(_first_turn, _EXPECTED)
ALL_TURNS = Format(_all_turns, _EXPECTED)
