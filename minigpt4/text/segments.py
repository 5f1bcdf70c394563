"""A prompt as segments: text that the template wrote, text that somebody typed, and slots for images.

Nothing is ever found again by searching in a finished string, so typed text can neither open an image slot nor end a
turn: `<ImageHere>` and the names of special tokens in a message are tokenised as plain letters. Training and chat
build their segments here, with one walk over the turns of a dialogue.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from minigpt4.text.templates import Template

IMAGE_SLOT = "<ImageHere>"  # how prompt files and printed prompts write an image slot


@dataclass(frozen=True)
class ImageSlot:
    """The place of one image; the k-th slot of a prompt belongs to the k-th image of its sample or conversation."""

    def __str__(self) -> str:
        return IMAGE_SLOT

    def __reduce__(self) -> str:
        return "IMAGE"  # `is IMAGE` also holds behind a process boundary


IMAGE = ImageSlot()


@dataclass(frozen=True)
class Text:
    """A stretch of prompt text.

    Special tokens are recognised in structure only, never in messages. A target is an answer with its end symbol: it
    is what training learns, and it is tokenised by itself, so that no label covers a token that is partly prompt.
    """

    text: str
    is_structure: bool = False
    is_target: bool = False

    def __str__(self) -> str:
        return self.text


class Marked(str):
    """A question that marks the places of its images itself: each `<ImageHere>` in it is one, all else is text.

    So are the questions of the newest release's samples.
    """

    @property
    def num_images(self) -> int:
        return self.count(IMAGE_SLOT)


Segment = ImageSlot | Text
Part = str | ImageSlot  # of a message: typed text or an image


def message_segments(parts: Sequence[Part], clean: Callable[[str], str] = str) -> list[Segment]:
    """Return the segments of one message, images written as `<Img>` slot `</Img>`; `clean` is applied to typed text."""
    segments: list[Segment] = []
    for index, part in enumerate(parts):
        segments += [Text(" ", True)] if index else []
        segments += (
            [Text("<Img>", True), IMAGE, Text("</Img>", True)]
            if part is IMAGE
            else [Text(clean(part))]
        )
    return segments


def marked_segments(question: Marked, clean: Callable[[str], str] = str) -> list[Segment]:
    """Return the segments of a question that marks its images; `clean` is applied to its text."""
    first, *others = question.split(IMAGE_SLOT)
    segments: list[Segment] = [Text(clean(first))]
    for piece in others:
        segments += [IMAGE, Text(clean(piece))]
    return segments


def dialogue_segments(
    template: Template, turns: Iterable[tuple[bool, list[Segment] | None]]
) -> list[Segment]:
    """Return the segments of a dialogue: the fixed text of `template` around (is_user, segments) of each turn.

    Segments None open an answer that is yet to be written.
    """
    result: list[Segment] = [Text(template.system, True)]
    for number, (is_user, segments) in enumerate(turns):
        before, after = template.user if is_user else template.assistant
        if is_user and number:
            before = template.separator + before
        if segments is None:
            result.append(Text(template.answer, True))
            continue
        if segments == [Text("")]:  # an empty answer is still a closed turn
            before = before.rstrip(" ")
        turn = [Text(before, True), *segments, Text(after, True)]
        if template.learns_answers and not is_user:
            turn = [replace(segment, is_target=True) for segment in turn]
        result += turn
    return result


@lru_cache(maxsize=4096)
def prompt_segments(prompt: str) -> tuple[Segment, ...]:
    """Return the segments of a prompt that is all structure, such as a line of a prompt file set into its template."""
    first, *others = prompt.split(IMAGE_SLOT)
    segments: list[Segment] = [Text(first, True)]
    for piece in others:
        segments += [IMAGE, Text(piece, True)]
    return tuple(segments)
