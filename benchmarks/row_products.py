"""Candidate Triton kernels for a weight [N, K] times one row of activations, most of the work of an answer's token.

A program computes `rows` outputs and reads their weights once; sums are in float32. The speed of such a product is limited
by how many bytes are in flight and, with few bits, by how many instructions a weight takes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """How a kernel divides the weight: the outputs and columns of a program's block, and its warps."""

    rows: int
    columns: int
    warps: int
    adds: bool = False  # int8 only: see _number


# None of them spills registers; a thread loads 16 bytes (int8: 8) at a time.
CONFIGS = {
    "fp16": (Config(4, 1024, 4), Config(2, 2048, 4), Config(2, 1024, 4)),
    "int8": (Config(4, 1024, 4), Config(4, 1024, 4, True), Config(2, 2048, 4, True)),
    "int4": (Config(2, 4096, 1), Config(4, 4096, 1), Config(8, 4096, 1)),
}


@triton.jit
def _load(pointers, mask):
    # a weight is read only once: it should not evict x, which every program reads, from the cache
    return tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def _number(w, ADDS: tl.constexpr):
    """Return w in float32. ADDS: convert integers by an addition, since a GPU has few units for conversions."""
    if ADDS:
        # the bits 0x4B400000 are 1.5 * 2^23, where adjacent floats are 1 apart
        return (w.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0
    else:
        return w.to(tl.float32)


@triton.jit
def wide_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    y_ptr,
    N,
    K: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ADDS: tl.constexpr,
):
    """y [N] = w [N, K] x [K], w in 16 bits, or in 8 with scale [N]. The next block of w loads while one is added up."""
    rows = tl.minimum(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    columns = tl.arange(0, BLOCK_K)[None, :]
    # as many weights to a load as values of x (8): otherwise one of the two would go through shared memory
    vector: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth
    pointers = tl.multiple_of(w_ptr + rows.to(tl.int64)[:, None] * K + columns, (1, vector))
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    following = _load(pointers, columns < K)
    for start in tl.static_range(0, K, BLOCK_K):
        w = following
        if start + BLOCK_K < K:
            following = _load(pointers + start + BLOCK_K, columns < K - start - BLOCK_K)
        x = tl.load(x_ptr + start + columns, mask=columns < K - start, other=0)
        total += _number(w, ADDS) * x.to(tl.float32)
    y = tl.sum(total, 1)
    if HAS_SCALE:
        y *= tl.load(scale_ptr + rows).to(tl.float32)
    tl.store(y_ptr + rows, y)


@triton.jit
def _times_level(w, x, p: tl.constexpr):
    """Return x times the level at bits 4 p to 4 p + 3 of each word of w, times 2^-39.

    An integer n below 2^24, its bits read as float32, is n * 2^-149. So a level costs only an AND and a multiply-add.
    x [1, ..] is first multiplied by a large power of two, for which the range of float32 has room.
    """
    if p >= 6:
        w = w >> 8
    place: tl.constexpr = 4 * p if p < 6 else 4 * p - 8
    unit: tl.constexpr = 2.0 ** (110 - place)
    return (w & (15 << place)).to(tl.float32, bitcast=True) * (x * unit)


@triton.jit
def int4_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    y_ptr,
    N,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """y [N] = weight times x [K]; w [N, 4, K / 32] and scale [N, K / 32] are those of `pack_int4`; |x| < 2^17.

    A thread takes adjacent groups, whose words, scales and x are adjacent in memory. Programs have one warp: only then
    are all tensors divided among the threads in the same way.
    """
    G: tl.constexpr = K // 32
    rows = tl.minimum(tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    groups = tl.arange(0, BLOCK_G)[None, :]
    pointers = w_ptr + rows.to(tl.int64)[:, None] * (4 * G) + groups
    scales = scale_ptr + rows[:, None] * G + groups
    total = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    for start in range(0, G, BLOCK_G):
        mask = groups < G - start
        scale = _load(scales + start, mask)
        x_sum = tl.zeros((1, BLOCK_G), tl.float32)
        part = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
        for i in tl.static_range(4):
            w = _load(pointers + i * G + start, mask)
            for p in tl.static_range(8):
                x = tl.load(x_ptr + (8 * i + p) * G + start + groups, mask=mask, other=0)
                x_sum += x.to(tl.float32)
                part += _times_level(w, x.to(tl.float32), p)
        # the lower and upper half of a scale are bfloat16: the step between levels, and the value of level 8
        step = (scale << 16).to(tl.float32, bitcast=True)
        middle = (scale & -65536).to(tl.float32, bitcast=True)
        total += step * (part * 2.0**39 - 8 * x_sum) + middle * x_sum
    tl.store(y_ptr + rows, tl.sum(total, 1))


def pack_int4(levels: Tensor, step: Tensor, middle: Tensor) -> tuple[Tensor, Tensor]:
    """Return int32 words [N, 4, K / 32] and scale [N, K / 32] for levels [N, K], 0 to 15, and step, middle in bfloat16.

    A weight is (level - 8) * step + middle; step and middle [N, K / 32] are its group's. Column c K / 32 + g is element c
    of group g, so that adjacent groups read adjacent x. Bits 4 p to 4 p + 3 of word i are element 8 i + p; the lower half
    of a scale is the step.
    """
    nibbles = levels.int().view(len(levels), 4, 8, -1)  # row, i, p, group
    words = nibbles[:, :, 0].clone()
    for p in range(1, 8):
        words |= nibbles[:, :, p] << (4 * p)
    return words, torch.stack([step, middle], -1).view(torch.int32)[..., 0]


def wide(w: Tensor, scale: Tensor | None, x: Tensor, config: Config) -> Tensor:
    """Return the product [1, N] of x [1, K] and w [N, K] in 16 bits, or in 8 bits with scale [N]."""
    y = x.new_empty(1, len(w))
    grid = (triton.cdiv(len(w), config.rows),)
    sizes = (*w.shape, scale is not None, config.rows, config.columns, config.adds)
    wide_kernel[grid](x, w, w if scale is None else scale, y, *sizes, num_warps=config.warps)
    return y


def int4(w: Tensor, scale: Tensor, x: Tensor, config: Config) -> Tensor:
    """Return the product [1, N] of x [1, K] and a weight packed by `pack_int4`."""
    y = x.new_empty(1, len(w))
    grid = (triton.cdiv(len(w), config.rows),)
    sizes = (len(w), x.shape[1], config.rows, config.columns // 32)
    int4_kernel[grid](x, w, scale, y, *sizes, num_warps=config.warps)
    return y
