"""The HTML by which the page shows a dialogue; no text of users or models can load or run anything in it."""

import re
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererProtocol
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from torch import nn

from minigpt4.common.config import Config
from minigpt4.common.device import peak_memory_mib
from minigpt4.serving.boxes import (
    PHRASE,
    colours_of,
    name_group,
    phrase_of,
    phrases_in,
    picture,
    remarks,
)
from minigpt4.serving.session import Turn

# HTML, links and images in an answer are shown as text: they could load or lead to anything
_MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable("table")
_MARKDOWN.disable(["image", "link", "autolink", "reference"])


def _read_phrase(state: StateInline, silent: bool) -> bool:
    """Parse a phrase with its boxes as one token, if boxes are shown; an inline rule of the Markdown parser."""
    match = PHRASE.match(state.src, state.pos, state.posMax) if state.env.get("colours") else None
    if match and not silent:
        state.push("phrase", "", 0).meta["match"] = match
    state.pos = match.end() if match else state.pos
    return match is not None


def _write_phrase(
    _: RendererProtocol, tokens: list[Token], index: int, __: object, env: dict
) -> str:
    """Return HTML of a phrase in the colour of its boxes; the rest of its text is hidden, but copied with it."""
    match = tokens[index].meta["match"]
    phrase, group = phrase_of(match), name_group(match)
    before = match.string[match.start() : match.start(group)]
    after = match.string[match.end(group) : match.end()]
    # no colour for a phrase without boxes, nor for one that Markdown has changed (`\|` in a table)
    colour = env["colours"].get(phrase.name) if phrase.boxes else None
    style = f' class="phrase" style="background: {colour}"' if colour else ""
    hidden = '<span class="raw">{}</span>'.format
    return (
        f"{hidden(escape(before))}<span{style}>{escape(match[group])}</span>{hidden(escape(after))}"
    )


_MARKDOWN.inline.ruler.after("text", "phrase", _read_phrase)
_MARKDOWN.add_render_rule("phrase", _write_phrase)


def as_typed(text: str) -> str:
    """Return HTML that shows `text` literally, without tags that could load anything."""
    return re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;")


def as_markdown(text: str, with_boxes: bool = False) -> str:
    """Return HTML of an answer's Markdown: headings, lists, tables, emphasis, code.

    `with_boxes`: phrases have the colours of their boxes, and remarks on invalid boxes follow.
    """
    phrases = phrases_in(text) if with_boxes else []
    notes = "".join(f'<p class="note">{escape(remark)}</p>' for remark in remarks(phrases))
    return f'<div class="answer">{_MARKDOWN.render(text, {"colours": colours_of(phrases)})}</div>{notes}'


def messages(turns: list[Turn], waiting: str = "", with_boxes: bool = False) -> list[dict]:
    """Return the messages of the chatbot, two for each turn; `waiting` is shown while the last answer is empty.

    `with_boxes`: boxes in questions and answers are drawn on the latest image before them.
    """
    shown, latest = [], None
    for turn in turns:
        # an old image may have been deleted
        images = [{"path": path} for path in turn.images if Path(path).is_file()]
        latest = turn.images[-1] if with_boxes and turn.images else latest
        shown.append(
            {"role": "user", "content": [*images, *_drawn(latest, turn.text), as_typed(turn.text)]}
        )
        mark = '<p class="note">stopped</p>' if turn.is_stopped else ""
        if turn.answer or mark:
            pictures = _drawn(latest, turn.answer)
            answer = as_markdown(turn.answer, bool(pictures)) + mark
            shown.append(
                {"role": "assistant", "content": [answer, *pictures] if pictures else answer}
            )
        elif waiting and turn is turns[-1]:
            shown.append({"role": "assistant", "content": f'<p class="note">{escape(waiting)}</p>'})
        elif turn is not turns[-1]:
            shown.append({"role": "assistant", "content": "…"})
    return shown


def _drawn(path: str | None, text: str) -> list[dict]:
    """Return a list with the image and the boxes of `text` on it, as part of a message; [] without image or boxes."""
    try:
        html = picture(path, text) if path and Path(path).is_file() else ""
    except (OSError, ValueError):  # no image: the turn itself will be refused for it
        html = ""
    if not html:
        return []
    component = {"type": "component", "component": "html", "value": html}
    return [component | {"constructor_args": {}, "props": {}}]


def about(model: nn.Module, config: Config) -> str:
    """Return a line about the model of `config`: architecture, size, checkpoint, device, number format, memory."""
    llm, cfg = model.llama_model, config.model_cfg
    kind = "int8" if cfg.low_resource else cfg.llm_quantization
    precision = str(model.compute_dtype).removeprefix("torch.")
    if kind != "none":
        precision = f"{kind} LLM"
    parts = [
        f"{cfg.arch}, {llm.config.model_type} of {llm.num_parameters() / 1e6:,.0f} M parameters",
        Path(cfg.ckpt).name if cfg.ckpt else "no checkpoint",
        f"{model.device}, {precision}",
        f"peak memory {peak_memory_mib(model.device) / 1024:.1f} GiB",
    ]
    return " · ".join(parts)
