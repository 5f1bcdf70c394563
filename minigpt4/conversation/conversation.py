"""The conversation that fills a template of `minigpt4.text.templates`."""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from minigpt4.conversation.chat import Chat
from minigpt4.conversation.generation import StoppingCriteriaSub
from minigpt4.text.segments import IMAGE, Segment, dialogue_segments, message_segments
from minigpt4.text.templates import CHATML, LLAMA2, TEMPLATES, VICUNA_V0, VICUNA_V1, Template, template_for

__all__ = [
    "CHATML",
    "CONV_VISION",
    "LLAMA2",
    "TEMPLATES",
    "VICUNA_V0",
    "VICUNA_V1",
    "CONV_VISION_LLama2",
    "CONV_VISION_Vicuna0",
    "CONV_VISION_minigptv2",
    "Chat",
    "Conversation",
    "Message",
    "StoppingCriteriaSub",
    "Template",
    "template_for",
]


@dataclass(frozen=True)
class Message:
    """What one side said: strings and image slots in order; None for an answer yet to be written."""

    is_user: bool
    parts: tuple | None

    def joined(self, part: object) -> "Message":
        """Return the message with one more part."""
        return replace(self, parts=(*self.parts, part))


@dataclass
class Conversation:
    """A dialogue. `turns` is replaced, never changed in place: a copy is independent at no cost."""

    template: Template
    turns: tuple[Message, ...] = ()

    @property
    def roles(self) -> tuple[str, str]:
        return self.template.roles

    @property
    def system(self) -> str:
        return self.template.system

    @property
    def messages(self) -> list[list[str | None]]:
        """A list of [role, text or None], `<Img><ImageHere></Img>` for images; changes to it are lost."""
        shown = [turn.parts and "".join(map(str, message_segments(turn.parts))) for turn in self.turns]
        return [[self.roles[not turn.is_user], text] for turn, text in zip(self.turns, shown, strict=True)]

    @messages.setter
    def messages(self, rows: Iterable[tuple[str, str | None]]) -> None:
        self.turns = ()
        for role, text in rows:
            self.append_message(role, text)

    @property
    def num_images(self) -> int:
        return sum(turn.parts.count(IMAGE) for turn in self.turns if turn.parts)

    def copy(self) -> "Conversation":
        return replace(self)

    def append_message(self, role: str, text: str | None) -> None:
        """Add a message of a role; None opens the answer. Text is only text, whatever it contains."""
        if role not in self.roles:
            raise ValueError(f"conversation: role {role!r}; expected one of {self.roles}")
        self.turns += (Message(role == self.roles[0], None if text is None else (str(text),)),)

    def append_image(self) -> None:
        """Add a message of the user that holds one image slot."""
        self.turns += (Message(True, (IMAGE,)),)

    def append_question(self, text: str) -> None:
        """Add the user's text to the image that waits for a question, else as a new message."""
        last = self.turns[-1] if self.turns else None
        if last and last.is_user and last.parts and last.parts[-1] is IMAGE:
            self.turns = (*self.turns[:-1], last.joined(text))
        else:
            self.append_message(self.roles[0], text)

    def without_open_answer(self) -> "Conversation":
        """Return a copy that does not end with an answer yet to be written."""
        return replace(self, turns=self.turns[:-1] if self.turns and self.turns[-1].parts is None else self.turns)

    def without_oldest(self, count: int) -> "Conversation":
        """Return a copy without the `count` oldest questions and their answers; every image stays.

        The images go to the front of the oldest question that is left.
        """
        starts = [index for index, turn in enumerate(self.turns) if turn.is_user]
        if count == 0 or not starts:
            return self.copy()
        first = starts[count]
        images = (IMAGE,) * replace(self, turns=self.turns[:first]).num_images
        kept = replace(self.turns[first], parts=(*images, *self.turns[first].parts))
        return replace(self, turns=(kept, *self.turns[first + 1 :]))

    def shortened(self, fits: Callable[["Conversation"], bool]) -> tuple["Conversation", int]:
        """Return (longest copy for which `fits(copy)` is true, number of oldest questions left out)."""
        most = max(sum(turn.is_user for turn in self.turns) - 1, 0)
        count = min(most, bisect_left(range(most + 1), True, key=lambda count: fits(self.without_oldest(count))))
        return self.without_oldest(count), count

    def segments(self) -> list[Segment]:
        """Return the prompt as a list of Text and IMAGE."""
        clean = self.template.neutralise
        turns = [(turn.is_user, turn.parts and message_segments(turn.parts, clean)) for turn in self.turns]
        return dialogue_segments(self.template, turns)

    def get_prompt(self) -> str:
        """Return the prompt as one string, for people to read: `<ImageHere>` for a slot."""
        return "".join(map(str, self.segments()))


CONV_VISION = Conversation(VICUNA_V0)  # the 2023 demo's
# The names of MiniGPT-4's newest version, with its prompts; a doubled BOS is left out, an answer
# ends with </s>.
CONV_VISION_Vicuna0 = Conversation(replace(VICUNA_V0, answer="Assistant: "))
CONV_VISION_LLama2 = Conversation(LLAMA2)
CONV_VISION_minigptv2 = Conversation(replace(LLAMA2, assistant=(" [/INST]", "</s><s>"), answer=" [/INST]", system=""))
