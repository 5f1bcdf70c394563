"""The linear layers of 8 and 4 bits: what each kind stores, how it multiplies, and the gradient of its input."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.models.llm.counting import is_as_on_gpu

# weights of so many outputs are widened at once on a CPU, so that they stay in its cache
CPU_ROWS = 256
FP8, FP8_TILE = torch.float8_e4m3fn, 16  # widths of a layer are multiples of it. Source: cuBLAS
INT4_GROUP = 32  # weights to a scale. Source: the blocks of GGUF's Q4


class _Product(torch.autograd.Function):
    """`layer.product(x)` for an input that needs a gradient; nothing is kept for it but the layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "QuantisedLinear") -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.product_backward(gradient), None


class QuantisedLinear(nn.Module):
    """A linear layer with a frozen `weight` of few bits and its `scale`.

    A kind computes `product`, x [T, in] -> [T, out] without bias, and its `product_backward`, [T,
    out] -> [T, in].
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = bias
        self.shape = tuple(weight.shape)  # [out, in]; a kind that packs its weights says otherwise

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def out_features(self) -> int:
        return self.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return [.., out] of x [.., in], in the type of x or of autocast."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = x.reshape(-1, x.shape[-1])
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        y = _Product.apply(rows, self) if needs_gradient else self.product(rows)
        y = y.to(x.dtype).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Int8Linear(QuantisedLinear):
    """Weight int8 [out, in], symmetric, scale [out]."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int8Linear":
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=1e-12) / 127
        levels = (weight / scale[:, None]).round().to(torch.int8)
        return cls(levels, scale.to(linear.weight.dtype), linear.bias)

    def product(self, x: Tensor) -> Tensor:
        if x.is_cuda and len(x) == 1 and (fused := _fused_int8(x.device)):
            return fused(x, self.weight, self.scale)
        if x.device.type != "cpu":
            return F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        if x.dtype == torch.bfloat16 and len(x) <= 8:  # four times as fast as widening
            return torch.ops.aten._weight_int8pack_mm(
                x.contiguous(), self.weight, self.scale.to(x.dtype)
            )
        return _widened(x, self.weight) * self.scale.to(x.dtype)

    def product_backward(self, gradient: Tensor) -> Tensor:
        return (gradient * self.scale.to(gradient.dtype)) @ self.weight.to(gradient.dtype)


def int8_row(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return [1, out] for x [1, in]: product and sum in float32. One pass over the 8-bit weights when compiled."""
    return ((weight.float() * x.float()).sum(1) * scale.float()).to(x.dtype)[None]


@cache
def _fused_int8(device: torch.device) -> Callable | None:
    """Return `int8_row` compiled, or None, with a warning, where the compiler does not work (it needs a C compiler)."""
    logging.info("compiling the 8-bit step; the result is kept on disk for next time")
    compiled = torch.compile(int8_row, dynamic=False)
    try:
        compiled(*(torch.ones(shape, device=device) for shape in ((1, 16), (16, 16), (16,))))
    except Exception as error:  # of many kinds, from Dynamo to the linker
        logging.warning(
            "model.llm_quantization: int8 answers run slowly here, torch.compile fails: %s", error
        )
        return None
    return compiled


class FP8Linear(QuantisedLinear):
    """Weight float8_e4m3 [out, in], symmetric, scale float32 [out]."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "FP8Linear":
        rows, columns = linear.weight.shape
        if rows % FP8_TILE or columns % FP8_TILE:
            raise ValueError(
                f"model.llm_quantization: fp8 needs layers whose inputs and outputs are multiples of {FP8_TILE}; the "
                f"LLM has one of {columns} x {rows}; take int8"
            )
        return cls(*_to_fp8(linear.weight.detach()), linear.bias)

    def product(self, x: Tensor) -> Tensor:
        return _fp8_product(x, self.weight, self.scale)

    def product_backward(self, gradient: Tensor) -> Tensor:
        # kernels want the summed dimension last
        transposed = self.weight.view(torch.uint8).t().contiguous().view(FP8)
        # the weight's scales belong to what is summed up, so they go into the gradient before it is rounded
        ones = self.scale.new_ones(len(transposed))
        return _fp8_product(gradient.float() * self.scale, transposed, ones).to(gradient.dtype)


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [rows, columns] in 8 bits, and the scale of each row, [rows] in float32."""
    x = x.float()
    scale = x.abs().amax(1).clamp(min=1e-12) / torch.finfo(FP8).max
    return (x / scale[:, None]).to(FP8), scale


def _fp8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return x [T, in] times weight [out, in] of `scale` [out] in x's type; bfloat16 is what kernels put out."""
    levels, steps = _to_fp8(x)
    # torch 2.11 has no kernel on a CPU; that of later versions gives the same numbers
    if x.device.type == "cpu" and not is_as_on_gpu():
        with torch.autocast("cpu", enabled=False):
            product = _widened(levels.float(), weight).mul_(steps[:, None]).mul_(scale)
        return product.bfloat16().to(x.dtype)
    by_row = F.ScalingType.RowWise
    product = F.scaled_mm(
        levels, weight.t(), steps[:, None], by_row, scale[None], by_row, output_dtype=torch.bfloat16
    )
    return product.to(x.dtype)


def _widened(x: Tensor, weight: Tensor) -> Tensor:
    """Return x [T, in] times weight [out, in], whose rows are widened to x's type a few at a time, for a CPU."""
    return torch.cat([F.linear(x, _as_wide(rows, x.dtype)) for rows in weight.split(CPU_ROWS)], 1)


def _as_wide(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `weight` [rows, columns] in a wider type. A CPU converts FP8 value by value: a table is five times as fast."""
    if weight.dtype != FP8:
        return weight.to(dtype)
    table = torch.arange(256, dtype=torch.uint8).view(FP8).to(dtype)  # of all its values: exact
    return table.index_select(0, weight.view(torch.uint8).flatten().int()).view(weight.shape)


class Int4Linear(QuantisedLinear):
    """Weight of 4 bits in the order of the device's kernel, scale [in / 32, out, 2] (step, middle) in bfloat16."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int4Linear":
        rows, columns = linear.weight.shape
        if columns % INT4_GROUP or rows % 16:
            raise ValueError(
                f"model.llm_quantization: int4 needs layers whose inputs are a multiple of {INT4_GROUP} and "
                f"outputs of 16; the LLM has one of {columns} x {rows}; take int8 or nf4"
            )
        weight = linear.weight.detach().float().view(rows, -1, INT4_GROUP)
        low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
        # rounded to what is stored before the levels are chosen, so that they make up for it
        step = ((high - low).clamp(min=1e-8) / 15).bfloat16()
        middle = (low + 8 * step.float()).bfloat16()
        levels = ((weight - middle.float()) / step.float() + 8).round().clamp(0, 15).to(torch.int32)
        scale = torch.cat([step, middle], -1).transpose(0, 1).contiguous()
        layer = cls(cls._pack(levels.view(rows, columns)), scale, linear.bias)
        layer.shape = (rows, columns)
        return layer

    @staticmethod
    def _pack(levels: Tensor) -> Tensor:
        if not levels.is_cuda:
            return torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
        tiles = next(tiles for tiles in (8, 4, 2) if levels.shape[1] % (16 * tiles) == 0)
        pairs = (levels[:, ::2] << 4 | levels[:, 1::2]).to(torch.uint8)
        return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)

    def product(self, x: Tensor) -> Tensor:
        kernels = torch.ops.aten
        product = kernels._weight_int4pack_mm if x.is_cuda else kernels._weight_int4pack_mm_for_cpu
        return product(x.bfloat16().contiguous(), self.weight, INT4_GROUP, self.scale)


class NF4Shape(QuantisedLinear):
    """Stands for a layer of bitsandbytes where there are no values: holds as much, and widens its weights at once."""

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, x.new_empty(self.shape))

    def product_backward(self, gradient: Tensor) -> Tensor:
        return gradient @ gradient.new_empty(self.shape)


LAYERS = {"int8": Int8Linear, "fp8": FP8Linear, "int4": Int4Linear, "nf4": NF4Shape}
OWN_LAYERS = tuple(LAYERS.values())
