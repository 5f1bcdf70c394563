"""LLaVA's conversations: only the first question and answer, or all turns."""

from collections.abc import Iterator

from minigpt4.common.utils import whole_text
from minigpt4.datasets.datasets.record_text import ROLES, message_parts, without_image_mark
from minigpt4.datasets.datasets.skips import SkipSample
from minigpt4.datasets.instructions.records import Example, Format, Spot, id_of

CONNECT = "!@#"  # separates the turns of a sample, which are one text for the model to split. Source: MiniGPT-v2
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
    """Return (questions, answers), equally many; image placeholders are removed from the questions. Raises SkipSample.

    A last question without an answer is left out: there is nothing to learn from it.
    """
    messages = row.get("conversations")
    if not isinstance(messages, list) or len(messages) < 2:
        found = (
            f"{len(messages)} messages" if isinstance(messages, list) else type(messages).__name__
        )
        raise SkipSample(
            "bad_record", f"'conversations' has {found}; expected a question and an answer in turn"
        )
    questions, answers = [], []
    for number, message in enumerate(messages[: len(messages) // 2 * 2]):
        role, text = message_parts(message)
        is_answer = bool(number % 2)
        if not isinstance(role, str) or ROLES.get(role) != is_answer or not isinstance(text, str):
            expected = f'{{"from": "{"gpt" if is_answer else "human"}", "value": text}}'
            raise SkipSample(
                "bad_record", f"message {number} is {message!r:.60}; expected {expected}"
            )
        text = whole_text(text) if is_answer else without_image_mark(whole_text(text))
        if number == 0:
            # as the release does, because of the line break beside the placeholder
            text = text.replace("\n", "").strip()
        if not text.strip():
            raise SkipSample("bad_caption", f"message {number} is empty")
        (answers if is_answer else questions).append(text)
    return questions, answers


FIRST_TURN = Format(_first_turn, _EXPECTED)
ALL_TURNS = Format(_all_turns, _EXPECTED)
