"""Attention inside the segments of a packed batch: texts that do not see each other.

Shapes: T positions of all segments together, S segments, L positions of the longest, L' keys that
one of its queries can see, H query heads, K key heads, d head width.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minigpt4.common.device import send
from minigpt4.models.llm.counting import is_as_on_gpu

HALF = (torch.float16, torch.bfloat16)


class Segments:
    """The rows of a packed batch as attention wants them.

    `lengths` are those of the segments; with `num_shared` the first one is what all others begin
    with. On a GPU: limits of queries and keys as int32, and which keys, shared ones repeated, are
    those of the segments. `others`: lists of integers that a step needs on the device too, `sent` in the same copy.
    `rounding`: the kernel is told the longest lengths rounded up to a multiple, so that they are seldom others.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        num_shared: int = 0,
        others: Sequence[Sequence[int]] = (),
        rounding: int = 1,
    ):
        self.num_shared, self.device = num_shared, device
        self.lengths = [num_shared, *lengths] if num_shared else list(lengths)
        self.longest = num_shared + max(lengths)  # keys that one query can see
        self.stops = list(itertools.accumulate(self.lengths))
        self._grids = {}
        self.most_queries = -(-max(self.lengths) // rounding) * rounding
        self.most_keys = -(-self.longest // rounding) * rounding
        own = self._key_lists() if device.type == "cuda" or is_as_on_gpu() else ()
        self.num_own, self.sizes = len(own), [len(each) for each in (*own, *others)]
        self.take(send(list(itertools.chain(*own, *others)), device=device)[0])

    def take(self, flat: Tensor) -> None:
        """Let the integers of this batch be those of `flat` [all of them]: where they lie, in which others may come."""
        self.flat, tensors = flat, flat.split(self.sizes)
        if self.num_own:
            self.keys, self.own = tensors[2:4]
            self.query_limits, self.key_limits = (limits.int() for limits in tensors[:2])
        self.sent = tensors[self.num_own :]

    def grid(
        self, num_heads: int, num_key_heads: int, window: int | None, dtype: torch.dtype
    ) -> "Grid":
        """Return the Grid for such heads, made once: all layers of an LLM share it."""
        shape = (num_heads, num_key_heads, window, dtype)
        if shape not in self._grids:
            self._grids[shape] = Grid(self, *shape)
        return self._grids[shape]

    def send(self, values: Tensor) -> Tensor:
        """Return `values` on the device of the batch, without waiting for it."""
        return values.to(self.device, non_blocking=True)

    def _key_lists(self) -> tuple[list[int], ...]:
        """Return limits of queries and of keys, the keys of the fused kernel, and which of them are segments' own.

        It wants what is shared before each segment: those keys are repeated.
        """
        keys, own = [], []
        key_limits = [0]
        for number, (length, stop) in enumerate(zip(self.lengths, self.stops, strict=True)):
            keys += range(self.num_shared if number else 0)
            own += range(len(keys), len(keys) + length)
            keys += range(stop - length, stop)
            key_limits.append(len(keys))
        return [0, *self.stops], key_limits, keys, own


def attend(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None = None
) -> Tensor:
    """Return causal attention [T, H, d] of q [T, H, d] over k, v [T, K, d], segment by segment.

    `window`: the number of positions that each one sees, itself included; None for all before it.
    What is shared is a constant: gradients of its positions mean nothing.
    """
    if window is not None and window >= segments.longest:
        window = None
    if has_flash(q.device, q.dtype) or (is_as_on_gpu() and q.dtype in HALF):
        return _flash(q, k, v, segments, scale, window)
    return SegmentAttention.apply(q, k, v, segments, scale, window)


@functools.cache
def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's fused kernel for segments runs: half precision, a GPU of 2020 or later."""
    is_half = device.type == "cuda" and dtype in HALF
    return is_half and torch.cuda.get_device_capability(device) >= (8, 0)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None
) -> Tensor:
    if segments.num_shared:
        k, v = RepeatShared.apply(k, segments), RepeatShared.apply(v, segments)
    return FlashAttention.apply(q, k, v, segments, scale, window)


class FlashAttention(torch.autograd.Function):
    """torch's fused kernel for segments, called without `varlen_attn`, whose wrapper takes more host time than it.

    Keys and values are those of each segment, one segment behind the other; with fewer heads than the queries each
    serves several of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments,
        scale: float,
        window: int | None,
    ) -> Tensor:
        most = (segments.most_queries, segments.most_keys)
        limits = (segments.query_limits, segments.key_limits, *most)
        # without a window the kernel wants to know only that attention is causal
        left = -1 if window is None else window - 1
        options = {"scale": scale, "window_size_left": left, "window_size_right": 0}
        found = torch.ops.aten._flash_attention_forward(
            q, k, v, *limits, 0.0, window is None, False, **options
        )
        out, *kept = found[:4]  # beside it the sums of the softmax, and the state of a dropout of 0
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.limits, ctx.options = limits, options
        ctx.is_causal = window is None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # asked for once: recomputed layers give them once
        dropout = (0.0, ctx.is_causal, *saved[5:])
        grads = torch.ops.aten._flash_attention_backward(
            grad, *saved[:5], *ctx.limits, *dropout, **ctx.options
        )
        return *grads, None, None, None


class RepeatShared(torch.autograd.Function):
    """Keys or values [T, K, d] -> those that each segment sees, one segment behind the other."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return keys.index_select(0, segments.keys)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.segments.own), None


class SegmentAttention(torch.autograd.Function):
    """`attend` as matrix products over all segments at once, padded to the longest.

    On a CPU faster than the fused kernel, which takes one segment at a time there. Queries, keys
    and values are kept for backward as they came, not padded.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments,
        scale: float,
        window: int | None,
    ) -> Tensor:
        grid = segments.grid(q.shape[1], k.shape[1], window, q.dtype)
        scores = torch.bmm(grid.queries(q), grid.keys(k).transpose(1, 2)).mul_(scale)
        scores.view(grid.view).add_(grid.hidden)
        shares = scores.softmax(-1)
        if grid.real is not None:
            shares.view(grid.view).mul_(grid.real)
        ctx.save_for_backward(q, k, v, shares)
        ctx.grid, ctx.scale = grid, scale
        return grid.from_queries(torch.bmm(shares, grid.keys(v)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grid, (*inputs, shares) = ctx.grid, ctx.saved_tensors
        q, grad = grid.queries(inputs[0]), grid.queries(grad)
        k, v = map(grid.keys, inputs[1:])
        grad_v = torch.bmm(shares.transpose(1, 2), grad)
        grad_scores = torch.bmm(grad, v.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_scores, shares, -1, shares.dtype)
        grad_scores.mul_(ctx.scale)
        grad_q, grad_k = torch.bmm(grad_scores, k), torch.bmm(grad_scores.transpose(1, 2), q)
        grads = (grid.from_queries(grad_q), grid.from_keys(grad_k), grid.from_keys(grad_v))
        return *grads, None, None, None


class Grid:
    """Where the heads of segments stand in a batch [S * K, ..], padded to the longest segment.

    Queries of a segment: [H / K * L, d], keys and values: [L', d]. A padded place holds some
    position of its segment and sees everything; its attention is set to zero, so it neither gives
    nor gets.
    """

    def __init__(
        self,
        segments: Segments,
        num_heads: int,
        num_key_heads: int,
        window: int | None,
        dtype: torch.dtype,
    ):
        group = num_heads // num_key_heads
        lengths, num_shared = torch.tensor(segments.lengths), segments.num_shared
        before = torch.full_like(lengths, num_shared)  # keys that stand before a segment's own
        before[0] = 0  # nothing stands before what is shared
        starts = torch.tensor(segments.stops) - lengths
        place = torch.arange(max(segments.lengths))
        key_place = torch.arange(num_shared + len(place))
        self.view = (len(lengths), num_key_heads, group, len(place), len(key_place))
        self.num_heads, self.num_key_heads = num_heads, num_key_heads
        self.num_grids = len(lengths) * num_key_heads  # S * K
        # packed -> padded: which position each place takes
        row = starts[:, None] + torch.minimum(place, lengths[:, None] - 1)  # [S, L]
        own = key_place - before[:, None]  # [S, L']: below 0 for shared keys
        own_row = starts[:, None] + torch.minimum(own, lengths[:, None] - 1)
        key_row = torch.where(own < 0, key_place, own_row)
        self.query_rows = segments.send(_heads(row, num_heads, group))
        self.key_rows = segments.send(_heads(key_row, num_key_heads, 1))
        # padded -> packed: where each position is found again
        total = segments.stops[-1]
        segment = torch.arange(len(lengths)).repeat_interleave(lengths, output_size=total)  # [T]
        number = torch.arange(len(segment)) - starts[segment]
        self.query_places = segments.send(_places(segment, number, num_heads, len(place)))
        number += before[segment]
        self.key_places = segments.send(_places(segment, number, num_key_heads, len(key_place)))
        # added to scores: -inf where a query does not see a key
        is_real = place < lengths[:, None]  # [S, L]
        distance = place[:, None] - own[:, None]  # [S, L, L']
        unseen = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        unseen &= is_real[..., None]
        hidden = torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf)
        self.hidden = segments.send(hidden[:, None, None])
        # multiplied with what a query gives each key: 0 for padding; None if there is none
        is_even = len(set(segments.lengths)) == 1
        self.real = None if is_even else segments.send(is_real.to(dtype)[:, None, None, :, None])

    def queries(self, x: Tensor) -> Tensor:
        """Return [S * K, H / K * L, d] of [T, H, d]."""
        return self._take(x, self.query_rows).view(self.num_grids, -1, x.shape[-1])

    def keys(self, x: Tensor) -> Tensor:
        """Return [S * K, L', d] of [T, K, d]."""
        return self._take(x, self.key_rows).view(self.num_grids, -1, x.shape[-1])

    def from_queries(self, x: Tensor) -> Tensor:
        """Return [T, H, d] of what `queries` gave."""
        return self._take(x, self.query_places).view(-1, self.num_heads, x.shape[-1])

    def from_keys(self, x: Tensor) -> Tensor:
        """Return [T, K, d] of what `keys` gave, each from its own segment."""
        return self._take(x, self.key_places).view(-1, self.num_key_heads, x.shape[-1])

    @staticmethod
    def _take(x: Tensor, rows: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1]).index_select(0, rows)


def _heads(rows: Tensor, num_heads: int, group: int) -> Tensor:
    """Return indices into [T * heads] that put rows [S, L] into [S, heads / group, group, L]."""
    heads = torch.arange(num_heads).view(1, -1, group, 1)
    return (rows[:, None, None] * num_heads + heads).flatten()


def _places(segment: Tensor, number: Tensor, num_heads: int, length: int) -> Tensor:
    """Return indices into [S * heads * length] of packed positions [T] and their heads."""
    heads = torch.arange(num_heads)
    return ((segment[:, None] * num_heads + heads) * length + number[:, None]).flatten()
