"""What the page shows of a dialogue: HTML in which nothing that people or models write can load or run anything."""

import re
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt
from torch import nn

from minigpt4.common.config import Config
from minigpt4.common.device import peak_memory_mib
from minigpt4.serving.session import Turn

# HTML in an answer is text; so are links and images, which would lead and load from anywhere
_MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable("table")
_MARKDOWN.disable(["image", "link", "autolink", "reference"])


def as_typed(text: str) -> str:
    """Return HTML that shows `text` as it is: no tag works, so nothing can be loaded by it."""
    return re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;")


def as_markdown(text: str) -> str:
    """Return HTML of an answer's Markdown: headings, lists, tables, emphasis, code."""
    return f'<div class="answer">{_MARKDOWN.render(text)}</div>'


def messages(turns: list[Turn], waiting: str = "") -> list[dict]:
    """Return what a chatbot shows: two messages a turn. `waiting` stands for the words of the last answer to come."""
    shown = []
    for turn in turns:
        # an old image may be gone from the server
        images = [{"path": path} for path in turn.images if Path(path).is_file()]
        shown.append({"role": "user", "content": [*images, as_typed(turn.text)]})
        mark = '<p class="note">stopped</p>' if turn.is_stopped else ""
        if turn.answer or mark:
            shown.append({"role": "assistant", "content": as_markdown(turn.answer) + mark})
        elif waiting and turn is turns[-1]:
            shown.append({"role": "assistant", "content": f'<p class="note">{escape(waiting)}</p>'})
        elif turn is not turns[-1]:
            shown.append({"role": "assistant", "content": "…"})
    return shown


def about(model: nn.Module, config: Config) -> str:
    """Return a line on the model that `config` made: sizes, device, number format, memory."""
    llm, cfg = model.llama_model, config.model_cfg
    kind = "int8" if cfg.low_resource else cfg.llm_quantization
    held = str(model.compute_dtype).removeprefix("torch.") if kind == "none" else f"{kind} LLM"
    parts = [
        f"{cfg.arch}, {llm.config.model_type} of {llm.num_parameters() / 1e6:,.0f} M parameters",
        Path(cfg.ckpt).name if cfg.ckpt else "no checkpoint",
        f"{model.device}, {held}",
        f"memory {peak_memory_mib(model.device) / 1024:.1f} GiB at most so far",
    ]
    return " · ".join(parts)
