"""Reads the text of a record from any source: a tar, a file beside an image, or an annotation file.

A record is a mapping. Its text is a conversation, or else a caption, which may have a question. Values that are null,
NaN, blank or an empty list count as absent. Every text is cleaned by `clean_text`, and the image placeholder
(`<image>`, `<ImageHere>`, `<Img>..</Img>`) is removed: the image always precedes the first question.
"""

import json
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

from minigpt4.common.utils import LFS_POINTER, whole_text
from minigpt4.datasets.datasets.skips import SkipSample

# Keys in order of precedence. messages, query, response: LLaMA-Factory and ms-swift; txt: the file beside the image.
CONVERSATIONS = ("conversations", "messages")
CAPTIONS = ("caption", "text", "response", "txt")
QUESTIONS = ("instruction", "query")
ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}
MAX_CHARS = 100_000  # of a record's texts, about 25,000 tokens: bounds tokenization, after which `max_txt_len` cuts
_IMAGE_MARK = re.compile(
    r"<img>[^\n]{0,300}?</img>|<\|?image(?:here|_?pad|_?placeholder)?[ _]?\d*\s*/?\|?>", re.I
)
_OTHER_MARK = re.compile(r"<\|?(?:video|audio)(?:_?pad)?[ _]?\d*\s*\|?>", re.I)

Turns = tuple[tuple[str, str], ...]  # (question, answer), ..


def read_text(record: Any) -> str | Turns:
    """Return the caption of a record, or its turns. Raises SkipSample.

    A single turn whose question has no words, such as `<image>` alone, is a caption.
    """
    if not isinstance(record, dict):
        raise SkipSample("bad_record", f"is {type(record).__name__}, not a mapping")
    key, messages = _first_present(record, CONVERSATIONS)
    turns = _turns(messages, key) if key else [_question_and_caption(record)]
    turns = _truncated(turns)
    _check(record, list(chain.from_iterable(turns)))
    turns = tuple(
        (without_image_mark(question), without_image_mark(answer)) for question, answer in turns
    )
    is_caption = len(turns) == 1 and not turns[0][0]
    if not all(answer and (question or is_caption) for question, answer in turns):
        raise SkipSample(
            "bad_caption",
            f"an empty question or answer in '{key}'" if key else "the caption is empty",
        )
    return turns[0][1] if is_caption else turns


def has_text(record: dict) -> bool:
    """Return whether a record itself has a conversation or a caption, valid or not."""
    return _first_present(record, CONVERSATIONS + CAPTIONS)[0] is not None


def read_members(members: dict[str, bytes]) -> str | Turns:
    """Return the text, as `read_text`, of the "json" and "txt" members of a tar sample; one may be missing."""
    record = parse_json(members["json"]) if "json" in members else {}
    if "txt" in members and isinstance(record, dict):
        record = {**record, "txt": members["txt"]}
    return read_text(record)


def parse_json(text: str | bytes) -> Any:
    """Return the content of a JSON text. Raises SkipSample."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SkipSample("bad_record", f"not valid JSON ({error})") from error


def clean_text(text: str) -> str:
    """Return a text without lone surrogates, surrounding whitespace and byte order marks, with LF line ends."""
    text = whole_text(text).replace("\r\n", "\n").replace("\r", "\n")
    return text.strip().strip("\ufeff").strip()


def present(record: dict, key: str) -> Any:
    """Return the value of a record's key, with text cleaned, or None if it is absent, null, NaN or empty."""
    value = record.get(key)
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SkipSample("bad_caption", f"{key}: {error}; save it as UTF-8 text") from error
    if isinstance(value, str):
        value = clean_text(value)
    is_nan = isinstance(value, float) and value != value  # how pandas writes a missing value
    return None if is_nan or value in (None, "", [], {}) else value


def _first_present(record: dict, keys: Sequence[str]) -> tuple[str | None, Any]:
    """Return the first of `keys` that is `present`, and its value; (None, None) if none is."""
    for key in keys:
        if (value := present(record, key)) is not None:
            return key, value
    return None, None


def _question_and_caption(record: dict) -> tuple[str, str]:
    key, caption = _first_present(record, CAPTIONS)
    if key is None:
        if empty := [name for name in CAPTIONS if name in record]:
            found = "null" if record[empty[0]] is None else "empty"
            raise SkipSample("bad_caption", f"{empty[0]} is {found}")
        raise SkipSample(
            "no_caption", f"'caption' is missing (keys: {', '.join(map(str, record)) or 'none'})"
        )
    question_key, question = _first_present(record, QUESTIONS)
    for name, value in ((key, caption), (question_key, question)):
        if not isinstance(value, (str, type(None))):
            raise SkipSample("bad_caption", f"{name} is {type(value).__name__}, not text")
    return question or "", caption


def _turns(messages: Any, key: str) -> list[tuple[str, str]]:
    """Return the (question, answer) pairs of a list of messages, without an empty system message."""
    if isinstance(messages, list) and message_parts(messages[0])[0] == "system":
        if message_parts(messages[0])[1]:
            raise SkipSample(
                "bad_record", f"has a system message in '{key}'; the model's template has its own"
            )
        messages = messages[1:]
    if not isinstance(messages, list) or not messages or len(messages) % 2:
        found = (
            f"{len(messages)} messages" if isinstance(messages, list) else type(messages).__name__
        )
        raise SkipSample(
            "bad_caption", f"'{key}' has {found}; expected questions and answers in turn"
        )
    texts = [_message_text(message, number) for number, message in enumerate(messages)]
    return list(zip(texts[::2], texts[1::2], strict=True))


def _message_text(message: Any, number: int) -> str:
    role, text = message_parts(message)
    # even numbers are questions, odd ones answers
    if not isinstance(role, str) or ROLES.get(role) != number % 2 or not isinstance(text, str):
        expected = f'{{"from": "{("human", "gpt")[number % 2]}", "value": text}}'
        found = json.dumps(message, ensure_ascii=False)[:60]
        raise SkipSample("bad_caption", f"message {number} is {found}; expected {expected}")
    return clean_text(text)


def message_parts(message: Any) -> tuple[Any, Any]:
    """Return (role, text) of a message: of LLaVA's {"from", "value"}, or of the common {"role", "content"}."""
    if not isinstance(message, dict):
        return None, None
    return message.get("from", message.get("role")), message.get("value", message.get("content"))


def _truncated(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the turns, with the answer that reaches MAX_CHARS characters cut there. Raises SkipSample."""
    kept, room = [], MAX_CHARS
    for question, answer in turns:
        room -= len(question)
        if room > 0:
            kept.append((question, answer[:room]))
            room -= len(answer)
    if not kept:
        raise SkipSample(
            "bad_caption", f"a question of {len(turns[0][0]):,} characters; at most {MAX_CHARS:,}"
        )
    return kept


def _check(record: dict, texts: list[str]) -> None:
    """Raise SkipSample if a record has more than one image, other media, or text that is not supported."""
    marks = list(chain.from_iterable(map(_IMAGE_MARK.findall, texts)))
    images = present(record, "images")
    if len(marks) > 1:
        raise SkipSample(
            "bad_record",
            f"has {len(marks)} image marks ({', '.join(marks)}); a sample has one image",
        )
    if isinstance(images, list) and len(images) > 1:
        raise SkipSample("bad_record", f"has {len(images)} images; a sample has one")
    for text in texts:
        if text.startswith(LFS_POINTER):
            raise SkipSample(
                "bad_caption",
                "a Git LFS pointer, not the text: install git-lfs and run `git lfs pull`",
            )
        if mark := _OTHER_MARK.search(text):
            raise SkipSample(
                "bad_record", f"has {mark[0]} in a text; a sample has one image and no more"
            )
    if not texts[0]:  # beside a caption without a question, the following keys are ignored
        return
    for key in ("system", "history"):
        if present(record, key) is not None:
            raise SkipSample(
                "bad_record", f"has a '{key}', which is not read; write all turns as 'messages'"
            )


def without_image_mark(text: str) -> str:
    """Return a text without image placeholders and the whitespace around them."""
    pieces = _IMAGE_MARK.split(text)
    if len(pieces) == 1:
        return text
    return " ".join(filter(None, map(str.strip, pieces)))
