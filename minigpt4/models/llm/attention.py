"""Attention inside the segments of a packed batch: texts one behind the other that do not see each other.

Shapes: T positions of all segments together, H query heads, K key heads, d head width.
"""

import functools
import inspect
import itertools
from contextlib import contextmanager
from contextvars import ContextVar

import torch

HALF = (torch.float16, torch.bfloat16)
# Shortest / longest of the segments that are padded to one length. More products of less padding are faster on a CPU
# for long segments in float32 alone: by 6 % of a step with texts of stage 2, 512 wide.
LIKE, LONG = 0.9, 128
_counting = ContextVar("counting", default=False)


@contextmanager
def as_on_gpu(is_so=True):
    """Take the way of a GPU inside the block for tensors without values, wherever they say they lie."""
    token = _counting.set(is_so)
    try:
        yield
    finally:
        _counting.reset(token)


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

    def grids(self, *shape):
        """Return the Grids, one after the other, for (query heads, key heads, window, type), made once."""
        if shape not in self._grids:
            is_worth_it = shape[-1] == torch.float32 and self.longest >= LONG
            groups = self._groups(LIKE if is_worth_it else 0)
            self._grids[shape] = [Grid(self, first, stop, *shape) for first, stop in groups]
        return self._grids[shape]

    def _groups(self, like):
        """Return [(first, stop)] of segments in a row, the shortest at least `like` times as long as the longest."""
        starts = [0]
        for number, length in enumerate(self.lengths):
            group = [*self.lengths[starts[-1] : number], length]
            if min(group) < like * max(group):
                starts.append(number)
        return list(itertools.pairwise([*starts, len(self.lengths)]))

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
    """`attend` as matrix products over many segments at once, padded to the longest; softmax within is float32.

    On a CPU faster than the fused kernel, which takes one segment at a time there. Queries, keys and values are kept
    for backward as they came, not padded.
    """

    @staticmethod
    def forward(ctx, q, k, v, segments, scale, window):
        ctx.grids, ctx.scale = segments.grids(q.shape[1], k.shape[1], window, q.dtype), scale
        found, shares = [], []
        for grid in ctx.grids:
            scores = torch.bmm(grid.queries(q), grid.keys(k).transpose(1, 2)).mul_(scale)
            shares.append(grid.drop_padding(grid.hide(scores).softmax(-1)))
            found.append(grid.from_queries(torch.bmm(shares[-1], grid.keys(v))))
        ctx.save_for_backward(q, k, v, *shares)
        return torch.cat(found)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *shares = ctx.saved_tensors
        grids = zip(ctx.grids, shares, strict=True)
        found = [_backward(grid, ctx.scale, grad, own, q, k, v) for grid, own in grids]
        return *map(torch.cat, zip(*found, strict=True)), None, None, None


def _backward(grid, scale, grad, shares, q, k, v):
    """Return the gradients of a grid's own queries, keys and values."""
    q, k, v, grad = grid.queries(q), grid.keys(k), grid.keys(v), grid.queries(grad)
    grad_v = torch.bmm(shares.transpose(1, 2), grad)
    grad_scores = torch.bmm(grad, v.transpose(1, 2))
    grad_scores = torch._softmax_backward_data(grad_scores, shares, -1, shares.dtype).mul_(scale)
    grad_q, grad_k = torch.bmm(grad_scores, k), torch.bmm(grad_scores.transpose(1, 2), q)
    return grid.from_queries(grad_q), grid.from_keys(grad_k), grid.from_keys(grad_v)


class Grid:
    """Where the heads of segments in a row stand in a batch [segments * K, ..] of segments padded to the longest.

    Queries of a segment: [H / K * longest, d], keys and values: [what it shares + longest, d]. A padded place holds
    some position of its segment and sees everything; its attention is set to zero, so it neither gives nor gets.
    """

    def __init__(self, segments, first, stop, num_heads, num_key_heads, window, dtype):
        group = num_heads // num_key_heads
        own_lengths, num_shared = segments.lengths[first:stop], segments.num_shared
        lengths = torch.tensor(own_lengths)
        before = torch.full_like(lengths, num_shared)  # keys that stand before a segment's own
        if num_shared and first == 0:
            before[0] = 0
        starts = torch.tensor(segments.stops[first:stop]) - lengths
        place = torch.arange(max(own_lengths))
        row = starts[:, None] + torch.minimum(place, lengths[:, None] - 1)  # [S, L]
        key_place = torch.arange(num_shared + len(place))
        own = key_place - before[:, None]  # [S, L']: number among the segment's own keys, below 0 for shared ones
        key_row = torch.where(own < 0, key_place, starts[:, None] + torch.minimum(own, lengths[:, None] - 1))
        send = lambda tensor: tensor.to(segments.device, non_blocking=True)  # noqa: E731
        self.shape = len(lengths) * num_key_heads
        self.query_rows = send(_heads(row, num_heads, group))
        self.key_rows = send(_heads(key_row, num_key_heads, 1))
        segment = torch.tensor([number for number, length in enumerate(own_lengths) for _ in range(length)])
        number = torch.arange(len(segment)) - (starts - starts[0])[segment]
        self.query_places = send(_places(segment, number, num_heads, len(place)))
        self.key_places = send(_places(segment, number + before[segment], num_key_heads, len(key_place)))
        is_real = place < lengths[:, None]  # [S, L]
        distance = place[:, None] - own[:, None]  # [S, L, L']
        unseen = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        unseen &= is_real[..., None]
        hidden = torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf)
        self.hidden = send(hidden[:, None, None])
        is_even = len(set(own_lengths)) == 1  # nothing is padded
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
