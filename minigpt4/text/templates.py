"""Dialogue formats as data: the fixed text around questions and answers, in training and in a chat.

A `Template` holds both forms of a format: `prompt_template` of the training configuration, as one string, and the pieces
of a chat. `template_for` finds the template of a model's configuration.
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
    """The fixed text of a dialogue format. Special tokens are written as text; the model's tokenizer recognises them."""

    roles: tuple[str, str]  # names for the 2023 calls (`conv.append_message(conv.roles[0], ..)`)
    user: tuple[str, str]  # text before and after a message of the user
    assistant: tuple[str, str]  # text before and after an answer
    answer: str  # text before the answer to be generated
    stop: tuple[str, ...]  # strings that end an answer
    # `prompt_template` of the training configuration, with {} for the instruction
    training: str | None = None
    system: str = ""  # opens the dialogue; includes `around_system`
    around_system: tuple[str, str] = ("", "")  # text before and after the system message
    markers: tuple[str, ...] = ()  # text that only the template may contain, never a message
    separator: str = ""  # before every question but the first
    learns_answers: bool = False  # answers, with the text that closes them, are targets
    is_system_typed: bool = False  # the system message is only text, like a question

    def for_training(self, prompt_template: str, end_sym: str) -> "Template":
        """Return the template with `prompt_template` around each question and `end_sym` after each answer.

        The text between an answer and the next question is that of a chat.
        """
        before, after = prompt_template.split("{}", 1)
        # `closing` begins with the end symbol; where the prompt begins with `closing`, it is not written twice
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
        """The system message: `system` without the text around it."""
        before, after = self.around_system
        return self.system.removeprefix(before).removesuffix(after)

    def with_system(self, text: str) -> "Template":
        """Return the template with another system message, given with or without the text around it."""
        before, after = self.around_system
        text = text.removeprefix(before).removesuffix(after)
        return replace(self, system=f"{before}{text}{after}" if text or not before else "")

    def is_like(self, other: "Template") -> bool:
        """Return whether the text around questions and answers is the same, but for spaces and LLaMA's <s> and </s>."""

        def words(template: Template) -> list[str]:
            return [re.sub(r"\s|</?s>", "", text) for text in (*template.user, *template.assistant)]

        return words(self) == words(other)

    def neutralise(self, text: str) -> str:
        """Return `text` with a space inside every marker (`###` -> `## #`), so that a message cannot forge a turn."""
        for marker in self.markers:
            if marker not in text:  # the usual case; an LLM may have hundreds of special tokens
                continue
            text = re.sub(f"(?<={re.escape(marker[:-1])})(?={re.escape(marker[-1])})", " ", text)
        return text


# Source: MiniGPT-4 2023. A chat opens the answer with "Assistant:", training with " ###Assistant: ".
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
# Source: MiniGPT-v2, which opens an answer without a space after it.
MINIGPT_V2 = replace(
    LLAMA2,
    assistant=(" [/INST]", "</s><s>"),
    answer=" [/INST]",
    training="[INST] {} [/INST]",
    system="",
)
# The prompts of chat and training are the same, token for token. Source: the format of SmolLM2, Qwen and others.
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

    An unknown format becomes a new Template: the text before {} opens a message, the text after {} opens the answer.
    Raises ValueError for one without {}.
    """
    if not prompt_template:
        return VICUNA_V0
    # an exact match, or else one that differs only in spaces at the ends; the first of TEMPLATES counts
    for normalised in (str, str.strip):
        for template in TEMPLATES:
            if normalised(template.training) == normalised(prompt_template):
                return template
    if "{}" not in prompt_template:
        raise ValueError(
            f"model.prompt_template: {prompt_template!r} has no {{}} for the instruction; add one"
        )
    before, after = prompt_template.split("{}", 1)
    texts = (before.strip(), after.strip(), end_sym.strip())
    return Template(
        roles=("user", "assistant"),
        user=(before, ""),
        assistant=(after, end_sym),
        answer=after,
        stop=(end_sym.rstrip() or "\n",),
        training=prompt_template,
        around_system=("", end_sym),
        markers=tuple(text for text in texts if len(text) > 1),
    )


def read_chat_template(tokenizer: Any) -> tuple[str, str]:
    """Return (`prompt_template`, `end_sym`) of a tokenizer of transformers, from its chat template.

    They are the text around the second question of a dialogue: without BOS, and without a system message that the
    template may begin with. Raises ValueError for a template that fails, or does not write a dialogue turn by turn.
    """
    answer, question = "First answer", "Second question"
    turns = [
        {"role": "user", "content": "First question"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": question},
    ]
    try:
        dialogue = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(turns[:2], tokenize=False)
    except Exception as error:  # of any kind: a template may raise anything
        dialogue, answered = f"{type(error).__name__}: {error!s:.200}", None
    before, after = [*dialogue.partition(answer)[2].split(question, 1), ""][:2]
    closing = (answered or "").partition(answer)[2]
    if answered is None or not after.strip() or not before.startswith(closing):
        raise ValueError(
            f"model.prompt_template: the tokenizer's own chat template cannot be used ({dialogue!r:.300}); set "
            "prompt_template and end_sym, or prompt_template to '' for none"
        )
    # every row begins with BOS already; ChatML's BOS token also opens each turn, and stays
    opening, bos = before.removeprefix(closing), tokenizer.bos_token
    if bos and bos not in after:
        opening = opening.replace(bos, "")
    prompt_template = f"{opening}{{}}{after}"
    known = {template.training.strip(): template for template in reversed(TEMPLATES)}
    if template := known.get(prompt_template.strip()):
        return prompt_template, template.stop[0]
    return prompt_template, closing if closing.strip() else tokenizer.eos_token


def separated_template(system: str, roles: Sequence[str], sep: str, sep2: str) -> Template:
    """Return the Template of a dialogue described as in the 2023 release; `sep` closes a question, `sep2` an answer.

    A role that ends in a letter or digit gets ": " appended; others, as the newest release's, which end in a space or a
    bracket, are used as they are. Raises ValueError unless all are texts, with two different roles.
    """
    texts = (system, sep, sep2, *roles)
    if len(texts) != 5 or not all(isinstance(text, str) for text in texts) or roles[0] == roles[1]:
        found = f"system={system!r:.80}, roles={roles!r:.80}, sep={sep!r}, sep2={sep2!r}"
        raise ValueError(f"conversation: {found}; expected texts, and two different roles")
    user, assistant = (f"{role}: " if role[-1:].isalnum() else role for role in roles)
    separators = tuple(dict.fromkeys((sep, sep2)))
    stripped = dict.fromkeys(text.strip() for text in separators)
    return Template(
        roles=tuple(roles),
        user=(user, sep),
        assistant=(assistant, sep2),
        answer=assistant.rstrip(" ") if assistant != roles[1] else assistant,
        stop=tuple(text for text in separators if text.strip()),
        system=system + sep,
        markers=tuple(text for text in stripped if len(text) > 1),
        around_system=("", sep),
    )
