"""Texts of a batch one behind the other, without padding, and attention that keeps them apart.

Shapes: T positions of all rows together, N of them predict a target, H query heads, K key heads, d head width,
D LLM width, V vocabulary.
"""

import functools
import inspect
import itertools
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import nn

from minigpt4.models.prompts import IGNORED
from minigpt4.models.recompute import layers_again

ATTENTION = "minigpt4_packed"  # our name among the attention functions of transformers
HALF = (torch.float16, torch.bfloat16)
_counting = ContextVar("counting", default=False)


@contextmanager
def as_on_gpu(is_so=True):
    """Take the way of a GPU inside the block for tensors without values, wherever they say they lie."""
    token = _counting.set(is_so)
    try:
        yield
    finally:
        _counting.reset(token)


class Packed(NamedTuple):
    """A batch as lists: what to feed, where pictures go, what is predicted where. Needs no device, waits for none."""

    num_shared: int  # leading positions that begin every row, fed once
    rows: list  # index in the batch of each row that is fed; one without a target is not
    lengths: list  # of these rows, without what they share
    ids: list  # [T] token ids, 0 where a picture goes
    positions: list  # [T] from 0 in each row
    slots: list  # [rows * queries] where pictures go
    predicting: list  # [N] positions whose next token is a target
    targets: list  # [N]


def pack(prefixes, rows, num_queries):
    """Return the Packed of [(ids before the picture, ids behind it)] and what follows them, [prompts.Row].

    A row ends before its last target: what comes later predicts nothing. What all rows begin with is fed once: it lies
    before the pictures, so it is the same for all.
    """
    fed = [index for index, row in enumerate(rows) if any(label != IGNORED for label in row.labels)]
    beginnings = zip(*(prefixes[index][0] for index in fed), strict=False)
    shared = [column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, beginnings)]
    packed = Packed(len(shared), fed, [], list(shared), list(range(len(shared))), [], [], [])
    for index in fed:
        (before, behind), row = prefixes[index], rows[index]
        num_prefix = len(before) + num_queries + len(behind)
        predicting = [num_prefix + i - 1 for i, label in enumerate(row.labels) if label != IGNORED]
        length, start = predicting[-1] + 1, len(packed.ids) - len(shared)  # start: of the row, had it all its positions
        packed.lengths.append(length - len(shared))
        packed.ids.extend([*before, *[0] * num_queries, *behind, *row.ids][len(shared) : length])
        packed.positions.extend(range(len(shared), length))
        packed.slots.extend(range(start + len(before), start + len(before) + num_queries))
        packed.predicting.extend(start + i for i in predicting)
        packed.targets.extend(label for label in row.labels if label != IGNORED)
    return packed


class Segments:
    """The rows of a packed batch as attention wants them.

    `lengths` are those of the segments; with `num_shared` the first one is what all others begin with. On a GPU:
    limits of queries and keys as int32, and which keys, shared ones repeated, are those of the segments.
    """

    def __init__(self, lengths, device, num_shared=0):
        self.num_shared, self.device, self._grids = num_shared, device, {}
        self.lengths = [num_shared, *lengths] if num_shared else list(lengths)
        self.longest = num_shared + max(lengths)  # keys that one query can see
        self.stops = list(itertools.accumulate(self.lengths))
        if device.type == "cuda" or _counting.get():
            self._index_keys(device)

    def grid(self, *shape):
        """Return the Grid for (query heads, key heads, window, type), made once."""
        if shape not in self._grids:
            self._grids[shape] = Grid(self, *shape)
        return self._grids[shape]

    def _index_keys(self, device):
        keys, own = [], []
        for number, (length, stop) in enumerate(zip(self.lengths, self.stops, strict=True)):
            keys += range(self.num_shared if number else 0)
            own += range(len(keys), len(keys) + length)
            keys += range(stop - length, stop)
        num_keys = [length + (self.num_shared if number else 0) for number, length in enumerate(self.lengths)]
        limits = [[0, *itertools.accumulate(lengths)] for lengths in (self.lengths, num_keys)]
        send = lambda values, dtype: torch.tensor(values, dtype=dtype).to(device, non_blocking=True)  # noqa: E731
        self.query_limits, self.key_limits = (send(each, torch.int32) for each in limits)
        self.keys, self.own = send(keys, torch.int64), send(own, torch.int64)


def attend(q, k, v, segments, scale, window=None):
    """Return causal attention [T, H, d] of q [T, H, d] over k, v [T, K, d], inside each segment and what is shared.

    `window`: the number of positions that each one sees, itself included; None for all before it. What is shared is a
    constant: gradients of its positions mean nothing.
    """
    if window is not None and window >= segments.longest:
        window = None
    if _has_varlen(q.device, q.dtype) or (_counting.get() and q.dtype in HALF):
        return _varlen(q, k, v, segments, scale, window)
    return SegmentAttention.apply(q, k, v, segments, scale, window)


@functools.cache
def _has_varlen(device, dtype):
    """Whether torch's fused kernel for segments runs there: half precision, and a GPU of 2020 or later."""
    is_half = device.type == "cuda" and dtype in HALF
    return is_half and torch.cuda.get_device_capability(device) >= (8, 0)


def _varlen(q, k, v, segments, scale, window):
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters  # they changed between torch 2.10 and 2.15
    options = {"window_size": (-1 if window is None else window - 1, 0)} if "window_size" in known else {}
    if not options:
        options = {"is_causal": True}
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
    if segments.num_shared:
        k, v = (RepeatShared.apply(each, segments) for each in (k, v))
    longest = max(segments.lengths), segments.longest
    return varlen_attn(q, k, v, segments.query_limits, segments.key_limits, *longest, scale=scale, **options)


class RepeatShared(torch.autograd.Function):
    """Keys or values [T, K, d] -> those that each segment sees, one segment behind the other."""

    @staticmethod
    def forward(ctx, keys, segments):
        ctx.segments = segments
        return keys.index_select(0, segments.keys)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.segments.own), None


class SegmentAttention(torch.autograd.Function):
    """`attend` as matrix products over all segments at once, each padded to the longest; softmax within is float32.

    On a CPU faster than the fused kernel, which takes one segment at a time there. Queries, keys and values are kept
    for backward as they came, not padded.
    """

    @staticmethod
    def forward(ctx, q, k, v, segments, scale, window):
        grid = segments.grid(q.shape[1], k.shape[1], window, q.dtype)
        shares = torch.bmm(grid.queries(q), grid.keys(k).transpose(1, 2)).mul_(scale)
        shares = grid.hide(shares).softmax(-1)
        shares = grid.drop_padding(shares)
        ctx.save_for_backward(q, k, v, shares)
        ctx.grid, ctx.scale = grid, scale
        return grid.from_queries(torch.bmm(shares, grid.keys(v)))

    @staticmethod
    def backward(ctx, grad):
        (q, k, v, shares), grid = ctx.saved_tensors, ctx.grid
        q, k, v, grad = grid.queries(q), grid.keys(k), grid.keys(v), grid.queries(grad)
        grad_v = torch.bmm(shares.transpose(1, 2), grad)
        grad_scores = torch.bmm(grad, v.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_scores, shares, -1, shares.dtype).mul_(ctx.scale)
        grad_q, grad_k = torch.bmm(grad_scores, k), torch.bmm(grad_scores.transpose(1, 2), q)
        return grid.from_queries(grad_q), grid.from_keys(grad_k), grid.from_keys(grad_v), None, None, None


class Grid:
    """Where the heads of packed positions stand in a batch [segments * K, ..] of padded segments.

    Queries of a segment: [H / K * longest, d], keys and values: [what it shares + longest, d]. A padded place holds
    some position of its segment and sees everything; its attention is set to zero, so it neither gives nor gets.
    """

    def __init__(self, segments, num_heads, num_key_heads, window, dtype):
        group = num_heads // num_key_heads
        lengths, num_shared = torch.tensor(segments.lengths), segments.num_shared
        before = torch.full_like(lengths, num_shared)  # keys that stand before a segment's own
        before[0] = 0 if num_shared else before[0]
        starts = torch.tensor(segments.stops) - lengths
        place = torch.arange(max(segments.lengths))
        row = starts[:, None] + torch.minimum(place, lengths[:, None] - 1)  # [S, L]
        key_place = torch.arange(num_shared + len(place))
        own = key_place - before[:, None]  # [S, L']: number among the segment's own keys, below 0 for shared ones
        key_row = torch.where(own < 0, key_place, starts[:, None] + torch.minimum(own, lengths[:, None] - 1))
        send = lambda tensor: tensor.to(segments.device, non_blocking=True)  # noqa: E731
        self.shape = len(lengths) * num_key_heads
        self.query_rows = send(_heads(row, num_heads, group))
        self.key_rows = send(_heads(key_row, num_key_heads, 1))
        segment = torch.tensor([number for number, length in enumerate(segments.lengths) for _ in range(length)])
        number = torch.arange(len(segment)) - starts[segment]
        self.query_places = send(_places(segment, number, num_heads, len(place)))
        self.key_places = send(_places(segment, number + before[segment], num_key_heads, len(key_place)))
        is_real = place < lengths[:, None]  # [S, L]
        distance = place[:, None] - own[:, None]  # [S, L, L']
        unseen = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        unseen &= is_real[..., None]
        hidden = torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf)
        self.hidden = send(hidden[:, None, None])
        is_even = len(set(segments.lengths)) == 1  # nothing is padded
        self.real = None if is_even else send(is_real.to(dtype)[:, None, None, :, None])
        self.view = (len(lengths), num_key_heads, group, len(place), len(key_place))

    def queries(self, x):
        """Return [S * K, H / K * L, d] of [T, H, d]."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self.query_rows).view(self.shape, -1, x.shape[-1])

    def keys(self, x):
        """Return [S * K, L', d] of [T, K, d]."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self.key_rows).view(self.shape, -1, x.shape[-1])

    def from_queries(self, x):
        """Return [T, H, d] of what `queries` gave."""
        return x.view(-1, x.shape[-1]).index_select(0, self.query_places).view(-1, self.num_heads, x.shape[-1])

    def from_keys(self, x):
        """Return [T, K, d] of what `keys` gave, each from its own segment."""
        return x.view(-1, x.shape[-1]).index_select(0, self.key_places).view(-1, self.view[1], x.shape[-1])

    @property
    def num_heads(self):
        return self.view[1] * self.view[2]

    def hide(self, scores):
        """Add, in place, -inf where a query does not see a key."""
        scores.view(self.view).add_(self.hidden)
        return scores

    def drop_padding(self, shares):
        """Set the rows of padded queries to zero, in place."""
        if self.real is not None:
            shares.view(self.view).mul_(self.real)
        return shares


def _heads(rows, num_heads, group):
    """Return the indices into [T * heads] that put rows [S, L] into [S, heads / group, group, L], flat."""
    heads = torch.arange(num_heads).view(1, -1, group, 1)
    return (rows[:, None, None] * num_heads + heads).flatten()


def _places(segment, number, num_heads, length):
    """Return the indices into [S * heads * length] of packed positions [T] and their heads, flat."""
    heads = torch.arange(num_heads)
    return ((segment[:, None] * num_heads + heads) * length + number[:, None]).flatten()


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
