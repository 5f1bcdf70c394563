"""The text of a training sample: its prompt, with one place for the image, and what is learnt behind it.

    BOS <prompt before> <image> <prompt after> <answer + end symbol> [<next question> <answer + end symbol> ..]

Nothing here needs more than the tokenizer: prompts are lines of a file, or the sample's own, set into a template. Each
stretch in angle brackets is tokenised by itself, so no label covers a token that is partly prompt.
"""

import logging
from dataclasses import replace
from functools import lru_cache
from itertools import islice, pairwise
from typing import NamedTuple

from minigpt4.common.utils import expand_path
from minigpt4.text.templates import template_for

IMAGE_SLOT = "<ImageHere>"
IGNORED = -100  # label of a position without a target


class Segment(NamedTuple):
    """A stretch of text behind the prompt; `is_target`: an answer with its end symbol, which is learnt."""

    text: str
    is_target: bool


class Row(NamedTuple):
    """One sample's text behind its prompt: token ids, their labels (the id or IGNORED), how many ids were cut off."""

    ids: list
    labels: list
    num_cut: int


def batch_prompts(samples, drawn, settings, tokenizer):
    """Return each sample's prompt: its first question where it has turns, else its own instruction, else `drawn`."""
    num_samples = len(samples["text_input"])
    instructions = samples.get("instruction") or [""] * num_samples
    turns = samples.get("turns") or [()] * num_samples
    if any(turns):
        clean = _dialogue_template(settings, tokenizer).neutralise
        instructions = [clean(own[0][0]) if own else text for own, text in zip(turns, instructions, strict=True)]
    return [instruction_prompt(settings.prompt_template, text) if text else drawn for text in instructions]


def batch_rows(samples, settings, tokenizer):
    """Return the Row of each sample of {"text_input": captions, "turns": lists of (question, answer), () if none}.

    `settings` has `prompt_template`, `end_sym`, `max_txt_len`, `mask_eos_labels`: the model, or its section.
    Raises ValueError for turns without a prompt template, which alone can tell questions from answers.
    """
    texts = samples["text_input"]
    turns = samples.get("turns") or [()] * len(texts)
    template = _dialogue_template(settings, tokenizer) if any(turns) else None
    segments = [
        _dialogue_segments(own, template, settings) if own else [Segment(text + settings.end_sym, True)]
        for text, own in zip(texts, turns, strict=True)
    ]
    flat = [segment.text for row in segments for segment in row]
    ids = iter(tokenizer(flat, add_special_tokens=False, verbose=False).input_ids)
    ignored = {tokenizer.pad_token_id} if settings.mask_eos_labels else ()  # the pad token is the end token
    return [_row(zip(row, islice(ids, len(row)), strict=True), settings.max_txt_len, ignored) for row in segments]


def in_parts(samples, prefixes, rows, num_queries, max_tokens):
    """Return [(part of a batch, its share of all targets)] of parts with at most `max_tokens` tokens.

    `prefixes`: token ids (before, behind) each image; `rows`: what follows them. A sample that is longer stands
    alone; parts without a target are left out, unless the batch has none.
    """
    targets = [sum(label != IGNORED for label in row.labels) for row in rows]
    if not any(targets):
        return [(samples, 1)]
    starts, held = [0], 0
    for number, ((before, behind), row) in enumerate(zip(prefixes, rows, strict=True)):
        length = len(before) + num_queries + len(behind) + len(row.ids)
        if held and held + length > max_tokens:
            starts.append(number)
            held = 0
        held += length
    parts = [slice(*limits) for limits in pairwise([*starts, len(rows)])]
    cut = lambda value, part: value if isinstance(value, (int, float)) else value[part]  # noqa: E731
    return [
        ({key: cut(value, part) for key, value in samples.items()}, sum(targets[part]) / sum(targets))
        for part in parts
        if any(targets[part])
    ]


@lru_cache
def warn_of_cut(max_txt_len):
    """Say once that conversations are longer than the limit."""
    logging.warning(
        f"a conversation is longer than model.max_txt_len={max_txt_len} tokens: its last turns are cut off. Said once; "
        "python -m minigpt4.datasets.inspect counts them all"
    )


def _row(pieces, max_txt_len, ignored):
    """Return the Row of (Segment, its ids) pairs, cut to `max_txt_len`; a question whose answer is cut off goes too.

    It begins with an answer, so what is left of it always has a target.
    """
    positions = [(index, segment.is_target) for segment, ids in pieces for index in ids]
    kept = positions[:max_txt_len]
    while kept and not kept[-1][1]:
        kept.pop()
    labels = [index if is_target and index not in ignored else IGNORED for index, is_target in kept]
    return Row([index for index, _ in kept], labels, len(positions) - len(kept))


def _dialogue_template(settings, tokenizer):
    """Return the Template of a dialogue; its markers, which texts cannot forge, include special tokens and the slot."""
    if not settings.prompt_template:
        raise ValueError(
            "model.prompt_template: '' cannot tell the questions of a conversation from its answers; set the LLM's "
            "own, e.g. '###Human: {} ###Assistant: ' for Vicuna v0, or use data with captions alone"
        )
    special = [
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special and len(token.content) > 1
    ]
    template = template_for(settings.prompt_template, settings.end_sym)
    return replace(template, markers=(*template.markers, *special, IMAGE_SLOT))


def _dialogue_segments(turns, template, settings):
    """Return the Segments behind the first question; between answers stands what stands there in a chat."""
    closing = template.assistant[1]  # begins with the end symbol, and the next prompt may begin with it again
    opening = closing.removeprefix(settings.end_sym) + settings.prompt_template.removeprefix(closing)
    segments = []
    for number, (question, answer) in enumerate(turns):
        if number:
            segments.append(Segment(opening.replace("{}", template.neutralise(question)), False))
        segments.append(Segment(template.neutralise(answer) + settings.end_sym, True))
    return segments


def read_prompts(path, template, where="model"):
    """Return the list of prompts of a file, set into `template`; lines without an image slot are dropped.

    Raises ValueError or FileNotFoundError if any of them could not be used.
    """
    problems = prompt_problems(path, template, where)
    if problems:
        error = ValueError if expand_path(path).is_file() else FileNotFoundError
        raise error("\n".join(problems))
    return [template.replace("{}", line) for _, line in _lines(path)]


def prompt_ids(prompt, tokenizer):
    """Return (token ids before the image, ids after it) of a prompt; none without a prompt.

    Raises ValueError if it has not exactly one image slot.
    """
    if not prompt:
        return [], []
    pieces = prompt.split(IMAGE_SLOT)
    if len(pieces) != 2:
        raise ValueError(f"prompt {prompt!r} has {len(pieces) - 1} {IMAGE_SLOT}; expected exactly one")
    return tuple(tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces)


def instruction_prompt(template, instruction):
    """Return the prompt that asks `instruction` about one image, as a chat would, set into `template`."""
    return template.replace("{}", f"<Img>{IMAGE_SLOT}</Img> {instruction}")


def prompt_problems(path, template, where="model"):
    """Return what is wrong with prompt file and template, as lines that begin with the key; none without a file."""
    if not path:
        return []
    if not expand_path(path).is_file():
        return [f"{where}.prompt_path: no file at '{expand_path(path)}'; paths are relative to the current folder"]
    if template.count("{}") != 1:
        return [
            f"{where}.prompt_template: {template!r} has {template.count('{}')} {{}}; expected exactly one, where the "
            "prompt goes"
        ]
    lines = _lines(path)
    if not lines:
        return [f"{where}.prompt_path: no line of '{path}' has {IMAGE_SLOT}; every prompt needs exactly one"]
    return [
        f"{where}.prompt_path: '{path}' line {number} {problem}"
        for number, line in lines
        if (problem := _problem(template.replace("{}", line)))
    ]


def _problem(prompt):
    """Return what is wrong with one prompt, or nothing."""
    pieces = prompt.split(IMAGE_SLOT)
    if len(pieces) != 2:
        return f"has {len(pieces) - 1} {IMAGE_SLOT}; every prompt needs exactly one"
    if not all(pieces):
        side = "before" if not pieces[0] else "after"
        return f"has no text {side} {IMAGE_SLOT}; write some, e.g. <Img>{IMAGE_SLOT}</Img>"
    return None


def _lines(path):
    """Return (number from 1, line) of the lines that have an image slot."""
    text = expand_path(path).read_text(encoding="utf-8")
    return [(number, line) for number, line in enumerate(text.splitlines(), 1) if IMAGE_SLOT in line]
