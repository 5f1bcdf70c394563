"""Attention within the segments of a packed batch: each row is a segment, and segments do not attend to each other.

Shapes: T positions of all segments together, S segments, L positions in the longest segment, L' keys that one of its
queries can attend to, H query heads, K key heads, d head width.
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
    """The segments of a packed batch, described for the attention functions below.

    `lengths` are the segments' numbers of positions. With `num_shared` there is a first segment of so many positions
    that all others begin with. `others` are further lists of integers that the step needs on the device: they go there
    in the same copy and are then in `sent`. `rounding`: `most_queries` and `most_keys`, which the fused kernel is told,
    are rounded up to a multiple of it, so that they take few different values.

    For the fused kernel only (on a GPU): `query_limits` and `key_limits` are the cumulative lengths as int32; `keys`
    lists the position of each key, the shared ones repeated for each segment; `own` are the indices in `keys` of the
    keys that are not such repetitions.
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
        self.longest = num_shared + max(lengths)  # the most keys that one query can attend to
        self.stops = list(itertools.accumulate(self.lengths))
        self._grids = {}
        self.most_queries = -(-max(self.lengths) // rounding) * rounding
        self.most_keys = -(-self.longest // rounding) * rounding
        key_lists = self._key_lists() if device.type == "cuda" or is_as_on_gpu() else ()
        self.num_key_lists = len(key_lists)
        self.sizes = [len(each) for each in (*key_lists, *others)]
        self.set_integers(send(list(itertools.chain(*key_lists, *others)), device=device)[0])

    def set_integers(self, integers: Tensor) -> None:
        """Use `integers` [sum of `sizes`], all lists in one tensor; a CUDA graph has its own, refilled for each batch."""
        self.integers, tensors = integers, integers.split(self.sizes)
        if self.num_key_lists:
            self.keys, self.own = tensors[2:4]
            self.query_limits, self.key_limits = (limits.int() for limits in tensors[:2])
        self.sent = tensors[self.num_key_lists :]

    def grid(
        self, num_heads: int, num_key_heads: int, window: int | None, dtype: torch.dtype
    ) -> "Grid":
        """Return the Grid for these heads; it is cached, as all layers of an LLM use the same one."""
        shape = (num_heads, num_key_heads, window, dtype)
        if shape not in self._grids:
            self._grids[shape] = Grid(self, *shape)
        return self._grids[shape]

    def send(self, values: Tensor) -> Tensor:
        """Return `values` on the device of the batch, without waiting for it."""
        return values.to(self.device, non_blocking=True)

    def _key_lists(self) -> tuple[list[int], ...]:
        """Return the lists (query limits, key limits, keys, own) for the fused kernel; see the class.

        The kernel needs the keys of a segment in one piece, so the shared ones are repeated before each segment.
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
    """Return causal attention [T, H, d] of q [T, H, d] over k, v [T, K, d], within each segment.

    `window`: the number of positions that a position attends to, itself included; None for all up to itself.
    The shared positions count as constants: their gradients are not valid.
    """
    if window is not None and window >= segments.longest:
        window = None
    if has_flash(q.device, q.dtype) or (is_as_on_gpu() and q.dtype in HALF):
        if segments.num_shared:
            k, v = RepeatShared.apply(k, segments), RepeatShared.apply(v, segments)
        return FlashAttention.apply(q, k, v, segments, scale, window)
    return SegmentAttention.apply(q, k, v, segments, scale, window)


@functools.cache
def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's fused kernel for segments is available: half precision on a GPU of 2020 (Ampere) or later."""
    is_half = device.type == "cuda" and dtype in HALF
    return is_half and torch.cuda.get_device_capability(device) >= (8, 0)


class FlashAttention(torch.autograd.Function):
    """torch's fused kernel for segments, called directly: the wrapper `varlen_attn` takes more host time than the kernel.

    Keys and values are those that each segment attends to, segment after segment. With fewer key heads than query
    heads, each key head serves several query heads.
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
        # the kernel takes either a window or the flag for causal attention
        is_causal = window is None
        left = -1 if is_causal else window - 1
        options = {"scale": scale, "window_size_left": left, "window_size_right": 0}
        outputs = torch.ops.aten._flash_attention_forward(
            q, k, v, *limits, 0.0, is_causal, False, **options
        )
        out, *state = outputs[:4]  # state: logsumexp, and two tensors of a dropout of 0
        ctx.save_for_backward(q, k, v, out, *state)
        ctx.limits, ctx.options = limits, options
        ctx.is_causal = is_causal
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: with activation checkpointing a second read fails
        dropout = (0.0, ctx.is_causal, *saved[5:])
        grads = torch.ops.aten._flash_attention_backward(
            grad, *saved[:5], *ctx.limits, *dropout, **ctx.options
        )
        return *grads, None, None, None


class RepeatShared(torch.autograd.Function):
    """Keys or values [T, K, d] -> those that each segment attends to, segment after segment."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return keys.index_select(0, segments.keys)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.segments.own), None


class SegmentAttention(torch.autograd.Function):
    """`attend` as batched matrix products over all segments, padded to the longest.

    On a CPU this is faster than the fused kernel, which takes one segment at a time there. Queries, keys and values are
    saved for backward without padding.
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
        scores.view(grid.view).add_(grid.mask)
        probs = scores.softmax(-1)
        if grid.is_real is not None:
            probs.view(grid.view).mul_(grid.is_real)
        ctx.save_for_backward(q, k, v, probs)
        ctx.grid, ctx.scale = grid, scale
        return grid.from_queries(torch.bmm(probs, grid.keys(v)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grid, (*inputs, probs) = ctx.grid, ctx.saved_tensors
        q, grad = grid.queries(inputs[0]), grid.queries(grad)
        k, v = map(grid.keys, inputs[1:])
        grad_v = torch.bmm(probs.transpose(1, 2), grad)
        grad_scores = torch.bmm(grad, v.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_scores, probs, -1, probs.dtype)
        grad_scores.mul_(ctx.scale)
        grad_q, grad_k = torch.bmm(grad_scores, k), torch.bmm(grad_scores.transpose(1, 2), q)
        grads = (grid.from_queries(grad_q), grid.from_keys(grad_k), grid.from_keys(grad_v))
        return *grads, None, None, None


class Grid:
    """Index maps between the packed layout [T, heads, d] and a padded batch [S * K, .., d], one entry per key head.

    An entry holds the queries of a segment [H / K * L, d], and its keys and values [L', d]. A padded place is filled
    with some position of the segment. A padded query attends to everything, to avoid NaN, but its probabilities are
    then set to zero: it contributes to no output and no gradient. A padded key is masked.
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
        before = torch.full_like(lengths, num_shared)  # shared keys before a segment's own
        before[0] = 0  # the first segment is the shared one, or nothing is shared
        starts = torch.tensor(segments.stops) - lengths
        place = torch.arange(max(segments.lengths))
        key_place = torch.arange(num_shared + len(place))
        self.view = (len(lengths), num_key_heads, group, len(place), len(key_place))
        self.num_heads, self.num_key_heads = num_heads, num_key_heads
        self.batch_size = len(lengths) * num_key_heads  # S * K
        # packed -> padded: the position that each place takes
        row = starts[:, None] + torch.minimum(place, lengths[:, None] - 1)  # [S, L]
        own = key_place - before[:, None]  # [S, L']: below 0 for shared keys
        own_row = starts[:, None] + torch.minimum(own, lengths[:, None] - 1)
        key_row = torch.where(own < 0, key_place, own_row)
        self.query_rows = segments.send(_heads(row, num_heads, group))
        self.key_rows = segments.send(_heads(key_row, num_key_heads, 1))
        # padded -> packed: the place of each position
        total = segments.stops[-1]
        segment = torch.arange(len(lengths)).repeat_interleave(lengths, output_size=total)  # [T]
        number = torch.arange(len(segment)) - starts[segment]
        self.query_places = segments.send(_places(segment, number, num_heads, len(place)))
        number += before[segment]
        self.key_places = segments.send(_places(segment, number, num_key_heads, len(key_place)))
        # additive mask: -inf where a real query does not attend to a key
        is_real = place < lengths[:, None]  # [S, L]
        distance = place[:, None] - own[:, None]  # [S, L, L']
        is_hidden = distance < 0
        if window is not None:
            is_hidden |= distance >= window
        is_hidden &= is_real[..., None]
        mask = torch.zeros(is_hidden.shape, dtype=dtype).masked_fill_(is_hidden, -torch.inf)
        self.mask = segments.send(mask[:, None, None])
        # factor for probabilities: 1 for real queries, 0 for padded ones; None if there are none
        self.is_real = None
        if len(set(segments.lengths)) > 1:
            self.is_real = segments.send(is_real.to(dtype)[:, None, None, :, None])

    def queries(self, x: Tensor) -> Tensor:
        """Return [S * K, H / K * L, d] of [T, H, d]."""
        return self._select(x, self.query_rows).view(self.batch_size, -1, x.shape[-1])

    def keys(self, x: Tensor) -> Tensor:
        """Return [S * K, L', d] of [T, K, d]."""
        return self._select(x, self.key_rows).view(self.batch_size, -1, x.shape[-1])

    def from_queries(self, x: Tensor) -> Tensor:
        """Return [T, H, d] of a tensor in the layout of `queries`."""
        return self._select(x, self.query_places).view(-1, self.num_heads, x.shape[-1])

    def from_keys(self, x: Tensor) -> Tensor:
        """Return [T, K, d] of a tensor in the layout of `keys`, each position from its own segment."""
        return self._select(x, self.key_places).view(-1, self.num_key_heads, x.shape[-1])

    @staticmethod
    def _select(x: Tensor, rows: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1]).index_select(0, rows)


def _heads(rows: Tensor, num_heads: int, group: int) -> Tensor:
    """Return indices into [T * heads] for a batch [S, heads / group, group, L] of the positions `rows` [S, L]."""
    heads = torch.arange(num_heads).view(1, -1, group, 1)
    return (rows[:, None, None] * num_heads + heads).flatten()


def _places(segment: Tensor, number: Tensor, num_heads: int, length: int) -> Tensor:
    """Return indices into [S * heads * length] of packed positions [T] and their heads, flattened.

    `segment` [T] and `number` [T]: the segment of each position, and its number within it.
    """
    heads = torch.arange(num_heads)
    return ((segment[:, None] * num_heads + heads) * length + number[:, None]).flatten()
