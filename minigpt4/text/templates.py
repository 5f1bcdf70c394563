"""Dialogue formats as data: what stands around a question and an answer, in training and in a chat.

One `Template` knows both forms of a format: the string of the training configuration (`prompt_template`) and the pieces
of a dialogue. `template_for` finds it from a model's configuration.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

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
    training: str | None = (
        None  # `prompt_template` of the training configuration, {} for the instruction
    )
    system: str = ""  # opens the dialogue
    around_system: tuple[str, str] = ("", "")  # what stands before and after it, part of `system`
    markers: tuple[str, ...] = ()  # plain text that only the template may write
    separator: str = ""  # before every question but the first
    learns_answers: bool = False  # answers and what closes them are targets

    def for_training(self, prompt_template: str, end_sym: str) -> "Template":
        """Return the template whose dialogue is `prompt_template` around each question, `end_sym` behind each answer.

        What a chat writes between an answer and the next question stands there in training, too.
        """
        before, after = prompt_template.split("{}", 1)
        # begins with the end symbol, and the next prompt may begin with it again
        closing = self.assistant[1]
        return replace(
            self,
            system=closing if before.startswith(closing) else "",
            user=(before.removeprefix(closing), after),
            assistant=("", end_sym),
            separator=closing.removeprefix(end_sym),
            learns_answers=True,
        )

    @property
    def system_text(self) -> str:
        """`system` without what stands around it."""
        before, after = self.around_system
        return self.system.removeprefix(before).removesuffix(after)

    def with_system(self, text: str) -> "Template":
        """Return the template with another opening text, given with or without what stands around it."""
        before, after = self.around_system
        text = text.removeprefix(before).removesuffix(after)
        return replace(self, system=f"{before}{text}{after}" if text or not before else "")

    def is_like(self, other: "Template") -> bool:
        """Whether questions and answers stand between the same words, spaces and LLaMA's <s> and </s> aside."""

        def words(template: Template) -> list[str]:
            return [re.sub(r"\s|</?s>", "", text) for text in (*template.user, *template.assistant)]

        return words(self) == words(other)

    def neutralise(self, text: str) -> str:
        """Return `text` with every marker broken by a space (`###` -> `## #`): a message cannot forge a turn."""
        for marker in self.markers:
            if marker not in text:  # as good as always: an LLM may have hundreds of special tokens
                continue
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
    around_system=("", "###"),
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
    around_system=("", " "),
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
# Source: MiniGPT-v2, which opens an answer without a space.
MINIGPT_V2 = replace(
    LLAMA2,
    assistant=(" [/INST]", "</s><s>"),
    answer=" [/INST]",
    training="[INST] {} [/INST]",
    system="",
)
# The chat prompt is the training prompt, token for token. Source: the format of SmolLM2, Qwen and others.
CHATML = Template(
    roles=("user", "assistant"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
    answer="<|im_start|>assistant\n",
    stop=("<|im_end|>",),
    training="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    around_system=("<|im_start|>system\n", "<|im_end|>\n"),
)
TEMPLATES = (VICUNA_V0, VICUNA_V1, LLAMA2, MINIGPT_V2, CHATML)


def template_for(prompt_template: str | None = "", end_sym: str = "###") -> Template:
    """Return the Template of a model configuration (its `prompt_template` and `end_sym`); 2023's format if it has none.

    An unknown format is taken as it stands: its text before {} opens a message, the text behind {} opens the answer.
    """
    if not prompt_template:
        return VICUNA_V0
    for same in (str, str.strip):  # else spaces around it aside
        known = {same(template.training): template for template in reversed(TEMPLATES)}
        if same(prompt_template) in known:
            return known[same(prompt_template)]
    if "{}" not in prompt_template:
        raise ValueError(
            f"model.prompt_template: {prompt_template!r} has no {{}} for the instruction; add one"
        )
    before, after = prompt_template.split("{}", 1)
    stop = (end_sym.rstrip() or "\n",)
    markers = tuple(
        marker for marker in (before.strip(), after.strip(), end_sym.strip()) if len(marker) > 1
    )
    sides = {"user": (before, ""), "assistant": (after, end_sym), "around_system": ("", end_sym)}
    return Template(
        ("user", "assistant"),
        **sides,
        answer=after,
        stop=stop,
        training=prompt_template,
        markers=markers,
    )


def read_chat_template(tokenizer: Any) -> tuple[str, str]:
    """Return (`prompt_template`, `end_sym`) of a tokenizer of transformers, from its chat template.

    They are what stands around the second question, so without a system message that the template may begin with, and
    without BOS. Raises ValueError for a template that fails, or does not write a dialogue turn by turn.
    """
    texts = "First question", "First answer", "Second question"
    turns = [
        {"role": role, "content": text}
        for role, text in zip(("user", "assistant", "user"), texts, strict=True)
    ]
    try:
        dialogue = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(turns[:2], tokenize=False)
    except Exception as error:  # whatever a template raises
        dialogue, answered = f"{type(error).__name__}: {error!s:.200}", None
    before, after = [*dialogue.partition(texts[1])[2].split(texts[2], 1), ""][:2]
    closing = (answered or "").partition(texts[1])[2]
    if answered is None or not after.strip() or not before.startswith(closing):
        raise ValueError(
            f"model.prompt_template: the tokenizer's own chat template cannot be used ({dialogue!r:.300}); set "
            "prompt_template and end_sym, or prompt_template to '' for none"
        )
    # BOS stands before a whole row already; in ChatML it also opens turns
    opening, bos = before.removeprefix(closing), tokenizer.bos_token
    if bos and bos not in after:
        opening = opening.replace(bos, "")
    prompt_template = f"{opening}{{}}{after}"
    known = {template.training.strip(): template for template in reversed(TEMPLATES)}
    if template := known.get(prompt_template.strip()):
        return prompt_template, template.stop[0]
    return prompt_template, closing if closing.strip() else tokenizer.eos_token


def separated_template(system: str, roles: Sequence[str], sep: str, sep2: str) -> Template:
    """Return the Template of 2023's way to describe a dialogue; `sep` closes a question, `sep2` an answer.

    A role that is a name gets ": "; one that ends in a space or a bracket, as in the newest release, stands as it is.
    Raises ValueError for what cannot tell questions from answers.
    """
    texts = (system, sep, sep2, *roles)
    if len(texts) != 5 or not all(isinstance(text, str) for text in texts) or roles[0] == roles[1]:
        found = f"system={system!r:.80}, roles={roles!r:.80}, sep={sep!r}, sep2={sep2!r}"
        raise ValueError(f"conversation: {found}; expected texts, and two different roles")
    user, assistant = (f"{role}: " if role[-1:].isalnum() else role for role in roles)
    return Template(
        roles=tuple(roles),
        user=(user, sep),
        assistant=(assistant, sep2),
        answer=assistant.rstrip(" ") if assistant != roles[1] else assistant,
        stop=tuple({text: 0 for text in (sep, sep2) if text.strip()}),
        system=system + sep,
        markers=tuple({text.strip(): 0 for text in (sep, sep2) if len(text.strip()) > 1}),
        around_system=("", sep),
    )
