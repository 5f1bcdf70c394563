"""Texts of a batch one behind the other, without padding.

Shapes: T positions of all rows together, N of them predict a target, H query heads, d head width, D LLM width,
V vocabulary.
"""

import functools
import itertools
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import nn

from minigpt4.models.llm.attention import attend
from minigpt4.models.llm.recompute import layers_again
from minigpt4.text.rows import IGNORED

ATTENTION = "minigpt4_packed"  # our name among the attention functions of transformers


class Packed(NamedTuple):
    """A batch as lists: what to feed, where images go, what is predicted where. Needs no device, waits for none."""

    num_shared: int  # leading positions that begin every row, fed once
    rows: list  # index in the batch of each row that is fed, longest first; one without a target is not
    lengths: list  # of these rows, without what they share
    ids: list  # [T] token ids, 0 where an image goes
    positions: list  # [T] from 0 in each row
    slots: list  # [rows * queries] where images go
    predicting: list  # [N] positions whose next token is a target
    targets: list  # [N]


def pack(prefixes, rows, num_queries):
    """Return the Packed of [(ids before the image, ids behind it)] and what follows them, [prompts.Row].

    A row ends before its last target: what comes later predicts nothing. What all rows begin with is fed once: it lies
    before the images, so it is the same for all. The longest row comes first: those of like length lie together.
    """
    prefix_length = lambda index: sum(map(len, prefixes[index])) + num_queries  # noqa: E731
    targets = [[i for i, label in enumerate(row.labels) if label != IGNORED] for row in rows]
    fed = [index for index in range(len(rows)) if targets[index]]
    fed.sort(key=lambda index: prefix_length(index) + targets[index][-1], reverse=True)
    beginnings = zip(*(prefixes[index][0] for index in fed), strict=False)
    shared = [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, beginnings)]
    packed = Packed(len(shared), fed, [], list(shared), list(range(len(shared))), [], [], [])
    for index in fed:
        (before, behind), row = prefixes[index], rows[index]
        predicting = [prefix_length(index) + i - 1 for i in targets[index]]
        length, start = predicting[-1] + 1, len(packed.ids) - len(shared)  # start: of the row, had it all its positions
        packed.lengths.append(length - len(shared))
        packed.ids.extend([*before, *[0] * num_queries, *behind, *row.ids][len(shared) : length])
        packed.positions.extend(range(len(shared), length))
        packed.slots.extend(range(start + len(before), start + len(before) + num_queries))
        packed.predicting.extend(start + i for i in predicting)
        packed.targets.extend(row.labels[i] for i in targets[index])
    return packed


def _for_transformers(module, query, key, value, attention_mask, scaling, dropout=0.0, segments=None, **options):
    """`attend` as transformers calls it: [1, heads, T, d] in, [1, T, H, d] and no weights out."""
    unknown = {name for name, value in options.items() if name in _CHANGE_ATTENTION and value is not None}
    if unknown or dropout or attention_mask is not None or segments is None:
        raise NotImplementedError(f"attention with {', '.join(unknown) or 'dropout or a mask'} is not packed")
    q, k, v = (each[0].transpose(0, 1).contiguous() for each in (query, key, value))
    return attend(q, k, v, segments, scaling, options.get("sliding_window"))[None], None


# options of attention in transformers that change its result, beside those that `attend` takes
_CHANGE_ATTENTION = {"softcap", "s_aux", "position_bias", "head_mask", "indices"}


@contextmanager
def packed_attention(llm):
    """Let a model of transformers attend by segments inside the block; the calls there pass `segments`."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _for_transformers)
    config = llm.config.get_text_config()
    usual = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = usual


def label_logits(llm, embeds, positions, segments, predicting, recompute=False):
    """Return the logits [N, V] at the positions `predicting` [N] of packed embeddings [T, D]."""
    attention = functools.partial(packed_attention, llm)
    with attention(), layers_again(llm, attention) if recompute else nullcontext():
        return llm(
            inputs_embeds=embeds[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=predicting,
            segments=segments,
        ).logits[0]


class CrossEntropy(torch.autograd.Function):
    """Mean cross entropy of logits [N, V] with targets [N], computed in float32, a few rows at a time.

    For backward it keeps the logits in their own type and nothing in float32.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        ctx.save_for_backward(logits, targets)
        pieces = zip(*(each.split(_rows_at_a_time(logits)) for each in (logits, targets)), strict=True)
        sums = [nn.functional.cross_entropy(rows.float(), target, reduction="sum") for rows, target in pieces]
        return torch.stack(sums).sum() / len(targets)

    @staticmethod
    def backward(ctx, grad):
        logits, targets = ctx.saved_tensors
        size, out, scale = _rows_at_a_time(logits), torch.empty_like(logits), grad / len(targets)
        for part, rows, target in zip(*(each.split(size) for each in (out, logits, targets)), strict=True):
            shares = rows.float().softmax(-1)
            shares.scatter_add_(1, target[:, None], shares.new_full((len(target), 1), -1.0))
            part.copy_(shares.mul_(scale))
        return out, None


def _rows_at_a_time(logits):
    """Return how many rows make a piece: one that stays in a processor's cache, or is soon done on a GPU."""
    return max(1, (2**19 if logits.device.type == "cpu" else 2**26) // logits.shape[1])
