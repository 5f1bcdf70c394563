"""A prompt as segments: text written by the template, text typed by a user, and image slots.

No prompt is ever parsed from a finished string, so typed text can neither open an image slot nor end a turn:
`<ImageHere>` and the names of special tokens in a message are tokenised as plain text. Training and chat build the
segments of a dialogue by the same functions.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from minigpt4.text.templates import Template

IMAGE_SLOT = "<ImageHere>"  # an image slot in prompt files and printed prompts


@dataclass(frozen=True)
class ImageSlot:
    """The place of one image; the k-th slot of a prompt belongs to the k-th image of its sample or conversation."""

    def __str__(self) -> str:
        return IMAGE_SLOT

    def __reduce__(self) -> str:
        return "IMAGE"  # unpickles as the same object, so that `is IMAGE` holds in other processes


IMAGE = ImageSlot()


@dataclass(frozen=True)
class Text:
    """A stretch of prompt text.

    Special tokens are recognised only in structure (the template's text), never in messages. A target is an answer with
    its end symbol, which training learns; it is tokenised by itself, so that no target token is partly prompt.
    """

    text: str
    is_structure: bool = False
    is_target: bool = False

    def __str__(self) -> str:
        return self.text


class Marked(str):
    """A question whose text has `<ImageHere>` as its image slots, as in the samples of the newest release."""

    @property
    def num_images(self) -> int:
        """The number of its image slots."""
        return self.count(IMAGE_SLOT)


Segment = ImageSlot | Text
Part = str | ImageSlot  # of a message: typed text or an image


def message_segments(parts: Sequence[Part], clean: Callable[[str], str] = str) -> list[Segment]:
    """Return the segments of one message, each image as `<Img>` slot `</Img>`; `clean` is applied to typed text."""
    segments: list[Segment] = []
    for index, part in enumerate(parts):
        if index:
            segments.append(Text(" ", True))
        if part is IMAGE:
            segments += [Text("<Img>", True), IMAGE, Text("</Img>", True)]
        else:
            segments.append(Text(clean(part)))
    return segments


def marked_segments(question: Marked, clean: Callable[[str], str] = str) -> list[Segment]:
    """Return the segments of a Marked question; `clean` is applied to its text."""
    first, *others = question.split(IMAGE_SLOT)
    segments: list[Segment] = [Text(clean(first))]
    for piece in others:
        segments += [IMAGE, Text(clean(piece))]
    return segments


def dialogue_segments(
    template: Template, turns: Iterable[tuple[bool, list[Segment] | None]]
) -> list[Segment]:
    """Return the segments of a dialogue: of each turn, (is_user, segments), within the fixed text of `template`.

    A turn whose segments are None opens the answer that is to be generated.
    """
    result = _system_segments(template)
    for number, (is_user, segments) in enumerate(turns):
        before, after = template.user if is_user else template.assistant
        if is_user and number:
            before = template.separator + before
        if segments is None:
            result.append(Text(template.answer, True))
            continue
        if segments == [Text("")]:  # an empty answer: the turn is closed, without a space inside
            before = before.rstrip(" ")
        turn = [Text(before, True), *segments, Text(after, True)]
        if template.learns_answers and not is_user:
            turn = [replace(segment, is_target=True) for segment in turn]
        result += turn
    return result


def _system_segments(template: Template) -> list[Segment]:
    """Return the segments that open a dialogue."""
    if not (template.is_system_typed and template.system):
        return [Text(template.system, True)]
    before, after = template.around_system
    typed = Text(template.neutralise(template.system_text))
    return [Text(before, True), typed, Text(after, True)]


@lru_cache(maxsize=4096)
def prompt_segments(prompt: str) -> tuple[Segment, ...]:
    """Return the segments of a prompt that is all structure, such as a line of a prompt file within its template."""
    first, *others = prompt.split(IMAGE_SLOT)
    segments: list[Segment] = [Text(first, True)]
    for piece in others:
        segments += [IMAGE, Text(piece, True)]
    return tuple(segments)
