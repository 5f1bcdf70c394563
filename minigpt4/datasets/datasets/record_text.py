"""The one reader of a record's text, wherever it stands: in a tar, beside an image, in an annotation file.

A record is a mapping. Its text is a conversation, or else a caption, with a question where it has one. What is null,
NaN, blank or an empty list counts as absent. Every text is cleaned by `clean_text`, and the mark that stands for the
image (`<image>`, `<ImageHere>`, `<Img>..</Img>`) is taken out: the image stands before the first question.
"""

import json
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

from minigpt4.common.utils import LFS_POINTER
from minigpt4.datasets.datasets.skips import SkipSample

# Keys by rank. messages, query, response: LLaMA-Factory and ms-swift; txt: the file beside the image.
CONVERSATIONS = ("conversations", "messages")
CAPTIONS = ("caption", "text", "response", "txt")
QUESTIONS = ("instruction", "query")
ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}
MAX_CHARS = 100_000  # of a record's texts, some 25,000 tokens: `max_txt_len` cuts before, but not before tokenizing
_IMAGE_MARK = re.compile(
    r"<img>[^\n]{0,300}?</img>|<\|?image(?:here|_?pad|_?placeholder)?[ _]?\d*\s*/?\|?>", re.I
)
_OTHER_MARK = re.compile(r"<\|?(?:video|audio)(?:_?pad)?[ _]?\d*\s*\|?>", re.I)

Turns = tuple[tuple[str, str], ...]  # (question, answer), ..


def read_text(record: Any) -> str | Turns:
    """Return the caption of a record, or its turns. Raises SkipSample.

    One question without words, as `<image>` alone, leaves a caption.
    """
    if not isinstance(record, dict):
        raise SkipSample("bad_record", f"is {type(record).__name__}, not a mapping")
    key, messages = _first(record, CONVERSATIONS)
    turns = _bounded(_turns(messages, key) if key else [_question_and_caption(record)])
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
    """Return whether a record has a conversation or a caption of its own, good or bad."""
    return _first(record, CONVERSATIONS + CAPTIONS)[0] is not None


def read_members(members: dict[str, bytes]) -> str | Turns:
    """Return the text, as `read_text`, of the contents of a sample's "json" and "txt" files, of which one may lack."""
    record = parse_json(members["json"]) if "json" in members else {}
    if "txt" in members and isinstance(record, dict):
        record = {**record, "txt": members["txt"]}
    return read_text(record)


def parse_json(text: str | bytes) -> Any:
    """Return what a JSON text says. Raises SkipSample."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SkipSample("bad_record", f"not valid JSON ({error})") from error


def whole_text(text: str) -> str:
    """Return a text in which half of a surrogate pair, on which tokenizers fail, has become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def clean_text(text: str) -> str:
    """Return a whole text without byte order mark and blanks around it, with LF for line ends."""
    return (
        whole_text(text).replace("\r\n", "\n").replace("\r", "\n").strip().strip("\ufeff").strip()
    )


def present(record: dict, key: str) -> Any:
    """Return the value of a record's key, text cleaned, or None where it is absent, null, NaN or empty."""
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


def _first(record: dict, keys: Sequence[str]) -> tuple[str | None, Any]:
    """Return the first of `keys` whose value is there, and the value."""
    for key in keys:
        if (value := present(record, key)) is not None:
            return key, value
    return None, None


def _question_and_caption(record: dict) -> tuple[str, str]:
    key, caption = _first(record, CAPTIONS)
    if key is None:
        if empty := [name for name in CAPTIONS if name in record]:
            found = "null" if record[empty[0]] is None else "empty"
            raise SkipSample("bad_caption", f"{empty[0]} is {found}")
        raise SkipSample(
            "no_caption", f"'caption' is missing (keys: {', '.join(map(str, record)) or 'none'})"
        )
    asked_by, question = _first(record, QUESTIONS)
    for name, value in ((key, caption), (asked_by, question)):
        if not isinstance(value, (str, type(None))):
            raise SkipSample("bad_caption", f"{name} is {type(value).__name__}, not text")
    return question or "", caption


def _turns(messages: Any, key: str) -> list[tuple[str, str]]:
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
    values = [_message(message, number) for number, message in enumerate(messages)]
    return list(zip(values[::2], values[1::2], strict=True))


def _message(message: Any, number: int) -> str:
    who, value = message_parts(message)
    if ROLES.get(who if isinstance(who, str) else None) != number % 2 or not isinstance(value, str):
        expected = f'{{"from": "{("human", "gpt")[number % 2]}", "value": text}}'
        found = json.dumps(message, ensure_ascii=False)[:60]
        raise SkipSample("bad_caption", f"message {number} is {found}; expected {expected}")
    return clean_text(value)


def message_parts(message: Any) -> tuple[Any, Any]:
    """Return who says a message, and what; {"from", "value"} is LLaVA's, {"role", "content"} that of most others."""
    if not isinstance(message, dict):
        return None, None
    return message.get("from", message.get("role")), message.get("value", message.get("content"))


def _bounded(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the turns up to MAX_CHARS characters, the last answer cut there. Raises SkipSample."""
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
    """Raise SkipSample where a record is about anything but one image, or has text that has no place in a sample."""
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
    for key in ("system", "history") if texts[0] else ():
        if present(record, key) is not None:
            raise SkipSample(
                "bad_record", f"has a '{key}', which is not read; write all turns as 'messages'"
            )


def without_image_mark(text: str) -> str:
    """Return a text without the marks that stand for its image, and without the blanks around them."""
    pieces = _IMAGE_MARK.split(text)
    return " ".join(filter(None, map(str.strip, pieces))) if len(pieces) > 1 else text
