"""The quantised linear layers: what each kind stores, how it multiplies, and the gradient of its input."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# rows of an int8 weight that a CPU converts to the activations' type at a time, so that they stay in its cache
CPU_ROWS = 256
SMALLEST_SCALE = 1e-7  # of int8: float16 has no smaller numbers
INT4_GROUP = 32  # weights per scale. Source: the blocks of GGUF's Q4


class _Product(torch.autograd.Function):
    """`layer.product(x)` for an input that needs a gradient; it saves only a reference to the layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: "QuantisedLinear") -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.product_backward(gradient), None


class QuantisedLinear(nn.Module):
    """A linear layer with a frozen quantised `weight` and its `scale`.

    A subclass computes `product`, x [T, in] -> [T, out] without the bias, and `product_backward`, the gradient of the
    output [T, out] -> that of x [T, in].
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = bias
        self.shape = tuple(weight.shape)  # [out, in]; set by the caller where `weight` is packed

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def out_features(self) -> int:
        return self.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return [.., out] of x [.., in], in the autocast type, or that of x without autocast."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = x.reshape(-1, x.shape[-1])
        needs_gradient = torch.is_grad_enabled() and x.requires_grad
        y = _Product.apply(rows, self) if needs_gradient else self.product(rows)
        y = y.to(x.dtype).unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Int8Linear(QuantisedLinear):
    """A symmetric int8 weight [out, in] with scale [out]."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "Int8Linear":
        weight, dtype = linear.weight.detach().float(), linear.weight.dtype
        # the scale is rounded before the levels are chosen, so that they compensate for it
        scale = (weight.abs().amax(1) / 127).clamp(min=SMALLEST_SCALE).to(dtype)
        levels = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        return cls(levels, scale, linear.bias)

    def product(self, x: Tensor) -> Tensor:
        # GPU: a decoding step has a kernel that does not write the converted weight to memory
        if x.is_cuda and len(x) == 1 and (fused := _fused_int8(x.device)):
            return fused(x, self.weight, self.scale)
        if x.device.type != "cpu":
            return F.linear(x, self._converted(x.dtype))
        scale = self.scale.to(x.dtype)
        # CPU: for few rows, four times as fast as converting the weight; it reads in steps of 16 without a check
        if x.dtype == torch.bfloat16 and len(x) <= 8 and x.shape[1] % 16 == 0:
            return torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.weight, scale)
        parts = zip(self.weight.split(CPU_ROWS), scale.split(CPU_ROWS), strict=True)
        return torch.cat([F.linear(x, rows * of_rows[:, None]) for rows, of_rows in parts], 1)

    def product_backward(self, gradient: Tensor) -> Tensor:
        return gradient @ self._converted(gradient.dtype)

    def _converted(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] in `dtype`.

        Its levels alone would not do: sums of up to 127 times the weights overflow float16 (real LLMs have such
        activations), and gradients times the scale underflow.
        """
        # one kernel: the product has the scale's type
        return self.weight * self.scale.to(dtype)[:, None]


def int8_row(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return [1, out] for x [1, in], computed in float32; when compiled, in one pass over the 8-bit weights."""
    return ((weight.float() * x.float()).sum(1) * scale.float()).to(x.dtype)[None]


@cache
def _fused_int8(device: torch.device) -> Callable | None:
    """Return the compiled `int8_row`; where torch.compile does not work (it needs a C compiler), warn and return None."""
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


class Int4Linear(QuantisedLinear):
    """A 4-bit weight in the layout of the device's kernel, with scale [in / 32, out, 2] in bfloat16.

    The last dimension of `scale` is (step, middle): level n of 0 to 15 stands for middle + (n - 8) * step.
    """

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
        # step and middle are rounded to bfloat16 before the levels are chosen, so that the levels compensate for it
        step = ((high - low).clamp(min=1e-8) / 15).bfloat16()
        middle = (low + 8 * step.float()).bfloat16()
        levels = ((weight - middle.float()) / step.float() + 8).round().clamp(0, 15).to(torch.int32)
        scale = torch.cat([step, middle], -1).transpose(0, 1).contiguous()
        layer = cls(cls._pack(levels.view(rows, columns)), scale, linear.bias)
        layer.shape = (rows, columns)
        return layer

    @staticmethod
    def _pack(levels: Tensor) -> Tensor:
        """Return levels 0 to 15, int32 [out, in], as the device's kernel wants them."""
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
    """Stand-in for bitsandbytes' layer on tensors without values: the same memory, also for the converted weight."""

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, x.new_empty(self.shape))

    def product_backward(self, gradient: Tensor) -> Tensor:
        return gradient @ gradient.new_empty(self.shape)


LAYERS = {"int8": Int8Linear, "int4": Int4Linear, "nf4": NF4Shape}
OWN_LAYERS = tuple(LAYERS.values())
