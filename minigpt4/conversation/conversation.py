"""Prompt templates as data, and the conversation that fills them.

One `Template` knows both forms of a format: the string of the training configuration (`prompt_template`) and the pieces
of a dialogue. `template_for` finds it from a model's configuration.
"""

import re
from bisect import bisect_left
from dataclasses import dataclass, replace

from minigpt4.conversation.chat import Chat
from minigpt4.conversation.generation import StoppingCriteriaSub
from minigpt4.conversation.prompt import IMAGE, Text

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

# Source: MiniGPT-4 2023, word for word.
VISION_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. "
    "You will be able to see the image once I provide it to you. Please answer my questions."
)


@dataclass(frozen=True)
class Template:
    """The fixed text of a dialogue format. Special tokens are written by name; the model's tokenizer resolves them."""

    roles: tuple[str, str]  # names for the 2023 calls (`conv.append_message(conv.roles[0], ..)`)
    user: tuple[str, str]  # before and after a message of the user
    assistant: tuple[str, str]  # before and after an answer
    answer: str  # what stands before the answer to be written
    stop: tuple[str, ...]  # strings that end an answer
    training: str | None = None  # `prompt_template` of the training configuration, {} for the instruction
    system: str = ""  # opens the dialogue
    markers: tuple[str, ...] = ()  # plain text that only the template may write

    def neutralise(self, text):
        """Return `text` with every marker broken by a space (`###` -> `## #`): a message cannot forge a turn."""
        for marker in self.markers:
            text = re.sub(f"(?<={re.escape(marker[:-1])})(?={re.escape(marker[-1])})", " ", text)
        return text


# Source: MiniGPT-4 2023. A chat opens the answer by "Assistant:", training by " ###Assistant: ".
VICUNA_V0 = Template(
    roles=("Human", "Assistant"),
    user=("Human: ", "###"),
    assistant=("Assistant: ", "###"),
    answer="Assistant:",
    stop=("###",),
    training="###Human: {} ###Assistant: ",
    system=f"{VISION_SYSTEM}###",
    markers=("###",),
)
# Source: Vicuna v1.1 and v1.5 (FastChat's "vicuna_v1.1").
VICUNA_V1 = Template(
    roles=("USER", "ASSISTANT"),
    user=("USER: ", " "),
    assistant=("ASSISTANT: ", "</s>"),
    answer="ASSISTANT:",
    stop=("</s>",),
    training="USER: {} ASSISTANT: ",
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. "
    ),
    markers=("USER:", "ASSISTANT:"),
)
# Source: Llama-2 chat; system text and the space before an answer from MiniGPT-4's newest version.
LLAMA2 = Template(
    roles=("[INST]", "[/INST]"),
    user=("[INST] ", ""),
    assistant=(" [/INST] ", "</s><s>"),
    answer=" [/INST] ",
    stop=("</s>",),
    training="[INST] {} [/INST] ",
    system=VISION_SYSTEM,
    markers=("[INST]", "[/INST]", "<<SYS>>"),
)
# The chat prompt is the training prompt, token for token. Source: the format of SmolLM2, Qwen and others.
CHATML = Template(
    roles=("user", "assistant"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
    answer="<|im_start|>assistant\n",
    stop=("<|im_end|>",),
    training="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
)
TEMPLATES = (VICUNA_V0, VICUNA_V1, LLAMA2, CHATML)


def template_for(prompt_template="", end_sym="###"):
    """Return the Template of a model configuration (its `prompt_template` and `end_sym`); 2023's format if it has none.

    An unknown format is taken as it stands: its text before {} opens a message, the text behind {} opens the answer.
    """
    if not prompt_template:
        return VICUNA_V0
    for template in TEMPLATES:
        if template.training.strip() == prompt_template.strip():
            return template
    before, slot, after = prompt_template.partition("{}")
    if not slot:
        raise ValueError(f"model.prompt_template: {prompt_template!r} has no {{}} for the instruction; add one")
    stop = (end_sym,) if end_sym.strip() else ("\n",)
    markers = tuple(marker for marker in (before.strip(), after.strip(), end_sym.strip()) if len(marker) > 1)
    return Template(("user", "assistant"), (before, ""), (after, end_sym), after, stop, prompt_template, "", markers)


@dataclass(frozen=True)
class Message:
    """What one side said: strings and image slots in order; `parts` None is an answer yet to be written."""

    is_user: bool
    parts: tuple | None

    def joined(self, part):
        return replace(self, parts=(*self.parts, part))


@dataclass
class Conversation:
    """A dialogue. `turns` is replaced, never changed in place, so a copy is independent at no cost."""

    template: Template
    turns: tuple[Message, ...] = ()

    @property
    def roles(self):
        return self.template.roles

    @property
    def system(self):
        return self.template.system

    @property
    def messages(self):
        """A list of [role, text or None], images written as `<Img><ImageHere></Img>`; for display, changes are lost."""
        shown = [None if turn.parts is None else "".join(map(str, self._parts(turn, str))) for turn in self.turns]
        return [[self.roles[not turn.is_user], text] for turn, text in zip(self.turns, shown, strict=True)]

    @messages.setter
    def messages(self, rows):
        self.turns = ()
        for role, text in rows:
            self.append_message(role, text)

    @property
    def num_images(self):
        return sum(turn.parts.count(IMAGE) for turn in self.turns if turn.parts)

    def copy(self):
        return replace(self)

    def append_message(self, role, text):
        """Add a message of `role` (one of `roles`); None opens the answer. Text is only text, whatever it contains."""
        if role not in self.roles:
            raise ValueError(f"conversation: role {role!r}; expected one of {self.roles}")
        self.turns += (Message(role == self.roles[0], None if text is None else (str(text),)),)

    def append_image(self):
        """Add a message of the user that holds one image slot."""
        self.turns += (Message(True, (IMAGE,)),)

    def append_question(self, text):
        """Add the user's text: to the message whose image still waits for a question, else as a new message."""
        last = self.turns[-1] if self.turns else None
        if last and last.is_user and last.parts and last.parts[-1] is IMAGE:
            self.turns = (*self.turns[:-1], last.joined(text))
        else:
            self.append_message(self.roles[0], text)

    def without_open_answer(self):
        """Return a copy that does not end with an answer yet to be written."""
        return replace(self, turns=self.turns[:-1] if self.turns and self.turns[-1].parts is None else self.turns)

    def without_oldest(self, count):
        """Return a copy without the text of the `count` oldest questions and their answers; every image stays.

        The images go to the front of the oldest question that is left, as if it had been the first about them.
        """
        starts = [index for index, turn in enumerate(self.turns) if turn.is_user]
        if count == 0 or not starts:
            return self.copy()
        first = starts[count]
        images = [IMAGE for turn in self.turns[:first] for part in turn.parts if part is IMAGE]
        kept = replace(self.turns[first], parts=(*images, *self.turns[first].parts))
        return replace(self, turns=(kept, *self.turns[first + 1 :]))

    def shortened(self, fits):
        """Return (copy without as few of the oldest turns as make `fits(copy)` true, number of turns left out)."""
        most = max(sum(turn.is_user for turn in self.turns) - 1, 0)
        count = min(most, bisect_left(range(most + 1), True, key=lambda count: fits(self.without_oldest(count))))
        return self.without_oldest(count), count

    def segments(self):
        """Return the prompt as a list of Text and IMAGE."""
        segments = [Text(self.system, True)]
        for turn in self.turns:
            before, after = self.template.user if turn.is_user else self.template.assistant
            if turn.parts is None:
                segments.append(Text(self.template.answer, True))
            elif turn.parts == ("",):  # an empty answer is still a closed turn
                segments.append(Text(before.rstrip(" ") + after, True))
            else:
                segments += [Text(before, True), *self._parts(turn, self.template.neutralise), Text(after, True)]
        return segments

    def get_prompt(self):
        """Return the prompt as one string, for people to read: `<ImageHere>` for a slot."""
        return "".join(map(str, self.segments()))

    @staticmethod
    def _parts(turn, clean):
        segments = []
        for index, part in enumerate(turn.parts):
            segments += [Text(" ", True)] if index else []
            segments += [Text("<Img>", True), IMAGE, Text("</Img>", True)] if part is IMAGE else [Text(clean(part))]
        return segments


CONV_VISION = Conversation(VICUNA_V0)  # the 2023 demo's
# The names of MiniGPT-4's newest version, with its prompts; a doubled BOS is left out, an answer ends with </s>.
CONV_VISION_Vicuna0 = Conversation(replace(VICUNA_V0, answer="Assistant: "))
CONV_VISION_LLama2 = Conversation(LLAMA2)
CONV_VISION_minigptv2 = Conversation(replace(LLAMA2, assistant=(" [/INST]", "</s><s>"), answer=" [/INST]", system=""))
