"""Dialogue formats as data: what stands around a question and an answer, in training and in a chat.

One `Template` knows both forms of a format: the string of the training configuration (`prompt_template`) and the pieces
of a dialogue. `template_for` finds it from a model's configuration.
"""

import re
from dataclasses import dataclass, replace

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
    separator: str = ""  # before every question but the first
    learns_answers: bool = False  # answers and what closes them are targets

    def for_training(self, prompt_template: str, end_sym: str) -> "Template":
        """Return the template whose dialogue is `prompt_template` around each question, `end_sym` behind each answer.

        What a chat writes between an answer and the next question stands there in training, too.
        """
        before, after = prompt_template.split("{}", 1)
        closing = self.assistant[1]  # begins with the end symbol, and the next prompt may begin with it again
        return replace(
            self,
            system=closing if before.startswith(closing) else "",
            user=(before.removeprefix(closing), after),
            assistant=("", end_sym),
            separator=closing.removeprefix(end_sym),
            learns_answers=True,
        )

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


def template_for(prompt_template: str | None = "", end_sym: str = "###") -> Template:
    """Return the Template of a model configuration (its `prompt_template` and `end_sym`); 2023's format if it has none.

    An unknown format is taken as it stands: its text before {} opens a message, the text behind {} opens the answer.
    """
    if not prompt_template:
        return VICUNA_V0
    for template in TEMPLATES:
        if template.training.strip() == prompt_template.strip():
            return template
    if "{}" not in prompt_template:
        raise ValueError(f"model.prompt_template: {prompt_template!r} has no {{}} for the instruction; add one")
    before, after = prompt_template.split("{}", 1)
    stop = (end_sym,) if end_sym.strip() else ("\n",)
    markers = tuple(marker for marker in (before.strip(), after.strip(), end_sym.strip()) if len(marker) > 1)
    return Template(("user", "assistant"), (before, ""), (after, end_sym), after, stop, prompt_template, "", markers)
