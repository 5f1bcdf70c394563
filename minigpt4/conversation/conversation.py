"""Conversation: a list of [role, text], as in 2023, that fills a prompt template of `minigpt4.text.templates`."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import zip_longest

from minigpt4.conversation.chat import Chat
from minigpt4.conversation.generation import StoppingCriteriaSub
from minigpt4.conversation.message import Message
from minigpt4.text.segments import IMAGE, Segment, Text, dialogue_segments, message_segments
from minigpt4.text.templates import (
    CHATML,
    LLAMA2,
    MINIGPT_V2,
    TEMPLATES,
    VICUNA_V0,
    VICUNA_V1,
    Template,
    separated_template,
    template_for,
)

__all__ = [
    "CHATML",
    "CONV_VISION",
    "LLAMA2",
    "MINIGPT_V2",
    "TEMPLATES",
    "VICUNA_V0",
    "VICUNA_V1",
    "CONV_VISION_LLama2",
    "CONV_VISION_Vicuna0",
    "CONV_VISION_minigptv2",
    "Chat",
    "Conversation",
    "Message",
    "SeparatorStyle",
    "StoppingCriteriaSub",
    "Template",
    "template_for",
]

# the attributes of a Conversation that may be assigned
_SETTABLE = ("template", "system", "messages", "offset", "skip_next", "conv_id")


class SeparatorStyle(Enum):
    """As in 2023: one separator after every message, or `sep` after questions and `sep2` after answers."""

    SINGLE = auto()
    TWO = auto()


@dataclass(init=False)
class Conversation:
    """A dialogue. `messages` is a plain list of [role, text] that may be edited; each prompt is built from it anew.

    A text of None in the last message is an open answer: one still to be written. Constructed from a Template, or as
    in 2023 from `system`, `roles` and separators.
    """

    template: Template
    messages: list[list[str | None]]
    offset: int  # as in 2023: pages show the messages from this index on
    skip_next: bool  # as in 2023, for servers; nothing here reads it or conv_id
    conv_id: object

    def __init__(
        self,
        system: Template | str,
        roles: Sequence[str] = (),
        messages: Iterable[Sequence[str | None]] = (),
        offset: int = 0,
        sep_style: SeparatorStyle = SeparatorStyle.SINGLE,
        sep: str = "###",
        sep2: str | None = None,
        skip_next: bool = False,
        conv_id: object = None,
    ):
        if not isinstance(system, Template):
            after_answer = sep if sep_style is SeparatorStyle.SINGLE else sep2
            system = separated_template(system, roles, sep, after_answer)
        self.template, self.offset = system, offset
        self.skip_next, self.conv_id = skip_next, conv_id
        self.messages = [list(row) for row in messages]

    def __setattr__(self, name: str, value: object) -> None:
        if name == "messages" and not isinstance(value, list):
            raise ValueError(
                f"conversation.messages: a {type(value).__name__}; expected a list of [role, text]"
            )
        if name not in _SETTABLE:
            raise AttributeError(
                f"conversation.{name} is the template's: write Conversation(system=.., roles=.., messages=.., "
                "sep_style=.., sep=.., sep2=..) with the one that is wanted"
            )
        super().__setattr__(name, value)

    @property
    def roles(self) -> tuple[str, str]:
        return self.template.roles

    @property
    def system(self) -> str:
        """The system text, which opens the dialogue."""
        return self.template.system_text

    @system.setter
    def system(self, text: str) -> None:
        if not isinstance(text, str):
            raise ValueError(f"conversation.system: a {type(text).__name__}; expected text")
        self.template = self.template.with_system(text)

    @property
    def sep(self) -> str:
        """The separator after a question; `sep2` is the one after an answer."""
        return self.template.user[1]

    @property
    def sep2(self) -> str:
        return self.template.assistant[1]

    @property
    def sep_style(self) -> SeparatorStyle:
        return SeparatorStyle.SINGLE if self.sep == self.sep2 else SeparatorStyle.TWO

    @property
    def num_images(self) -> int:
        return sum(message.num_images for _, message in self._parsed() if message is not None)

    @property
    def num_chars(self) -> int:
        messages = [message for _, message in self._parsed() if message]
        return len(self.template.system) + sum(map(len, messages))

    def copy(self) -> "Conversation":
        """Return an independent copy."""
        return self._copy_with(self.messages)

    def append_message(self, role: str, text: str | None) -> None:
        """Append a message of `role`; a text of None opens an answer. For text that a user typed: `append_question`.

        Raises ValueError for an unknown role, or a `text` that is neither a string nor None.
        """
        if role not in self.roles:
            raise ValueError(f"conversation: role {role!r}; expected one of {self.roles}")
        if not (text is None or isinstance(text, str)):
            raise ValueError(
                f"conversation: a message of {type(text).__name__}; expected its text, or None"
            )
        self.messages.append([role, text])

    def append_image(self) -> None:
        """Append a user message that holds one image slot."""
        self.messages.append([self.roles[0], Message(message_segments([IMAGE]))])

    def append_question(self, text: str) -> None:
        """Append the user's text to the image just added, else as a new message; markers typed in it stay plain text."""
        question = Text(str(text))
        is_user, last = self._parsed()[-1] if self.messages else (False, None)
        if is_user and last and last.segments[-2:-1] == (IMAGE,):  # the last is its </Img>
            question = Message([*last.segments, Text(" ", True), question])
            self.messages[-1] = [self.roles[0], question]
        else:
            self.messages.append([self.roles[0], Message([question])])

    def append_answer(self, text: str) -> None:
        """Fill in the open answer; append one if none is open."""
        if self.messages and self.messages[-1][1] is None:
            self.messages.pop()
        self.append_message(self.roles[1], text)

    def without_open_answer(self) -> "Conversation":
        """Return a copy that does not end with an open answer."""
        is_open = self.messages and self.messages[-1][1] is None
        return self._copy_with(self.messages[:-1] if is_open else self.messages)

    def without_oldest(self, count: int, num_images: int = 0) -> "Conversation":
        """Return a copy without the `count` oldest questions and their answers, and `num_images` of their images.

        Their other images, the newest ones, move to the front of the oldest question that is left.
        """
        if count == 0:
            return self.copy()
        parsed, first = self._parsed(), self._turn_starts()[count]
        question = parsed[first][1]
        moved = sum(message.num_images for _, message in parsed[:first]) - num_images
        if moved:
            images = message_segments([IMAGE] * moved)
            question = Message([*images, Text(" ", True), *question.segments])
        return self._copy_with([[self.roles[0], question], *self.messages[first + 1 :]])

    def shortened(self, fits: Callable[["Conversation"], bool]) -> tuple["Conversation", int]:
        """Return (longest copy for which `fits(copy)` is true, number of oldest questions left out).

        The last question always stays, even if it does not fit.
        """
        most = max(len(self._turn_starts()) - 1, 0)
        count = _fewest(most, lambda count: fits(self.without_oldest(count)))
        return self.without_oldest(count), count

    def with_fewer_images(
        self, fits: Callable[["Conversation"], bool]
    ) -> tuple["Conversation", int]:
        """Return (the last question with the most images for which `fits(copy)` is true, number of oldest left out).

        The question's own images always stay, even if they do not fit.
        """
        starts = self._turn_starts()
        most = len(starts) - 1
        if most < 1:
            return self.copy(), 0
        earlier = self._parsed()[: starts[-1]]
        num_images = sum(message.num_images for _, message in earlier)
        count = _fewest(num_images, lambda count: fits(self.without_oldest(most, count)))
        return self.without_oldest(most, count), count

    def segments(self) -> list[Segment]:
        """Return the prompt as a list of Text and IMAGE. Raises ValueError for malformed messages."""

        def neutralised(segment: Segment) -> Segment:
            is_typed = segment is not IMAGE and not segment.is_structure
            return Text(self.template.neutralise(segment.text)) if is_typed else segment

        turns = []
        for number, (is_user, message) in enumerate(self._parsed()):
            if message is None and (is_user or number < len(self.messages) - 1):
                raise ValueError(f"conv.messages[{number}][1] was never written; set it to a text")
            segments = None if message is None else list(map(neutralised, message.segments))
            turns.append((is_user, segments))
        return dialogue_segments(self.template, turns)

    def get_prompt(self) -> str:
        """Return the prompt as one string, for people to read; `<ImageHere>` stands for an image."""
        return "".join(map(str, self.segments()))

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """Return the texts from message `offset` on as [question, answer] pairs, the format of 2023's page."""
        texts = [text for _, text in self.messages[self.offset :]]
        return [list(pair) for pair in zip_longest(texts[::2], texts[1::2])]

    def dict(self) -> dict[str, object]:
        """Return the dialogue as plain values under 2023's names; they rebuild one that was made from such."""
        names = ("system", "roles", "messages", "offset", "sep", "sep2", "conv_id")
        return {name: getattr(self, name) for name in names}

    def _copy_with(self, messages: Iterable[Sequence[str | None]]) -> "Conversation":
        rows = [list(row) if isinstance(row, (list, tuple)) else row for row in messages]
        others = {"offset": self.offset, "skip_next": self.skip_next, "conv_id": self.conv_id}
        conv = Conversation(self.template, **others)
        conv.messages = rows
        return conv

    def _turn_starts(self) -> list[int]:
        """Return the index of the first message of each turn: the images of a question, the question, its answer."""
        starts, is_open = [], False
        for index, (is_user, message) in enumerate(self._parsed()):
            if is_user and not is_open:
                starts.append(index)
            is_open = is_user and message is not None and message.is_image_only
        return starts

    def _parsed(self) -> list[tuple[bool, Message | None]]:
        """Return (is it the user's, message) for each of `messages`; the message is None for an open answer."""
        parsed = []
        for number, row in enumerate(self.messages):
            where = f"conv.messages[{number}]"
            if not isinstance(row, (list, tuple)) or len(row) != 2 or row[0] not in self.roles:
                raise ValueError(
                    f"{where}: {row!r:.200}; expected [role, text], the role one of {self.roles}"
                )
            is_user, text = row[0] == self.roles[0], row[1]
            if not (text is None or isinstance(text, str)):
                raise ValueError(
                    f"{where}: a {type(text).__name__}; expected its text, or None for the answer to come"
                )
            parsed.append((is_user, None if text is None else Message.read(text, is_user)))
        return parsed


def _fewest(most: int, fits: Callable[[int], bool]) -> int:
    """Return the smallest count up to `most` that fits, else `most`; if one fits, so do all larger ones."""
    return min(most, bisect_left(range(most + 1), True, key=fits))


CONV_VISION = Conversation(VICUNA_V0)  # the 2023 demo's
# names and prompts of MiniGPT-4's newest release, without its doubled BOS; an answer ends with </s>
CONV_VISION_Vicuna0 = Conversation(replace(VICUNA_V0, answer="Assistant: "))
CONV_VISION_LLama2 = Conversation(LLAMA2)
CONV_VISION_minigptv2 = Conversation(MINIGPT_V2)
