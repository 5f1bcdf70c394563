"""Decoder layers of a frozen LLaMA-like LLM that save for backward only what backward needs.

Supported are LLaMA's layers and those that differ by biases (Qwen 2.5) or by norms of queries and keys (Qwen 3). A
frozen linear layer does not need its input to pass a gradient on, so a layer saves only its input, queries, keys,
values, the residual stream before the MLP, gate and up; norms, rotary embedding and SwiGLU are recomputed. The result
is that of transformers; as in 2023, norms, rotary angles and softmax are computed in float32.

Shapes: T positions of a packed batch, D width, H query heads, K key heads, d head width, I MLP width.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.common import compiling
from minigpt4.models.llm import quantization, sharding
from minigpt4.models.llm import recompute as checkpointing
from minigpt4.models.llm.attention import Segments, attend

# the submodules of a LLaMA layer, and the submodules of each
_PARTS = {
    "self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
    "input_layernorm": set(),
    "post_attention_layernorm": set(),
}
_HEAD_NORMS = {"q_norm", "k_norm"}  # of some families, before the rotary embedding


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Return `layer(x)`; a plain linear layer is not called, as the hooks of torch's FLOP counter fail here."""
    return F.linear(x, layer.weight, layer.bias) if type(layer) is nn.Linear else layer(x)


def add_linear(residual: Tensor, layer: nn.Module, x: Tensor) -> Tensor:
    """Return residual [T, out] + layer(x), as one fused operation where the types allow it."""
    is_plain = type(layer) is nn.Linear and layer.bias is None
    if is_plain and x.dtype == layer.weight.dtype == residual.dtype:
        return torch.addmm(residual, x, layer.weight.t())
    return residual + linear(layer, x)


def linear_backward(layer: nn.Module, grad: Tensor, onto: Tensor | None = None) -> Tensor:
    """Return the gradient of a linear layer's input [T, in], added in place to `onto` if that is given."""
    if type(layer) is not nn.Linear:
        grad = quantization.product_backward(layer, grad)
        return grad if onto is None else onto.add_(grad)
    return grad @ layer.weight if onto is None else onto.addmm_(grad, layer.weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the RMS norm of x [.., D] times `weight`, in the type of x; the norm is computed in float32."""
    wide = x.float()
    return (wide * _inverse_rms(wide, eps)).to(x.dtype).mul_(weight)


def _inverse_rms(wide: Tensor, eps: float) -> Tensor:
    return wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, onto: Tensor | None = None
) -> Tensor:
    """Return the gradient of `rms_norm` with respect to x, plus `onto` if that is given."""
    wide = x.float()
    inverse = _inverse_rms(wide, eps)
    wide = wide * inverse  # the same name, so that the copy of x is freed
    grad = (grad * weight).float()
    mean = (grad * wide).mean(-1, keepdim=True)
    grad = grad.addcmul_(wide, mean, value=-1).mul_(inverse).to(x.dtype)
    return grad if onto is None else onto + grad


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [T, heads, d] with the rotary embedding: each pair (i, i + d / 2) is rotated by its angle.

    cos [T, 1, d], sin [T, 1, d / 2], whose other half would be equal.
    """
    first, second = x.chunk(2, dim=-1)
    out = x * cos
    out[..., : first.shape[-1]].addcmul_(second, sin, value=-1)
    out[..., first.shape[-1] :].addcmul_(first, sin)
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, each [T, I]."""
    return F.silu(gate).mul_(up)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `swiglu` with respect to gate and up; overwrites `grad`."""
    grad_up = F.silu(gate).mul_(grad)
    return torch.ops.aten.silu_backward(grad.mul_(up), gate), grad_up


class Kernels(NamedTuple):
    """The operations of a layer between its matrix products, which torch.compile can fuse."""

    rms_norm: Callable = rms_norm
    rms_norm_backward: Callable = rms_norm_backward
    rotate: Callable = rotate
    swiglu: Callable = swiglu
    swiglu_backward: Callable = swiglu_backward


EAGER = Kernels()


@cache
def compiled() -> Kernels:
    """Return the Kernels compiled by torch.compile, at their first calls; each reads and writes memory once."""
    return Kernels(*map(compiling.kernel, EAGER))


class QueryKeyValue(torch.autograd.Function):
    """x [T, D] -> queries [T, H, d], keys and values [T, K, d]: norm, linears, norms of heads, rotary embedding."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, layer: nn.Module, kernels: Kernels
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.layer, ctx.kernels = layer, kernels
        attention, norm = layer.self_attn, layer.input_layernorm
        normed = kernels.rms_norm(x, norm.weight, norm.variance_epsilon)
        q = linear(attention.q_proj, normed).unflatten(1, (-1, attention.head_dim))
        k = linear(attention.k_proj, normed).unflatten(1, (-1, attention.head_dim))
        v = linear(attention.v_proj, normed).unflatten(1, (-1, attention.head_dim))
        # the backward of head norms needs their inputs
        norm_inputs = (q, k) if _has_head_norms(attention) else ()
        ctx.save_for_backward(x, cos, sin, *norm_inputs)
        if norm_inputs:
            q = kernels.rms_norm(q, attention.q_norm.weight, attention.q_norm.variance_epsilon)
            k = kernels.rms_norm(k, attention.k_norm.weight, attention.k_norm.variance_epsilon)
        return kernels.rotate(q, cos, sin), kernels.rotate(k, cos, sin), v

    @staticmethod
    def backward(
        ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        (cos, sin), norm_inputs = rest[:2], rest[2:]
        attention, kernels = ctx.layer.self_attn, ctx.kernels
        norm = ctx.layer.input_layernorm
        # the gradient of a rotation is the rotation by the opposite angle
        opposite = -sin
        grad_q = kernels.rotate(grad_q, cos, opposite)
        grad_k = kernels.rotate(grad_k, cos, opposite)
        if norm_inputs:
            q, k = norm_inputs
            q_norm, k_norm = attention.q_norm, attention.k_norm
            grad_q = kernels.rms_norm_backward(grad_q, q, q_norm.weight, q_norm.variance_epsilon)
            grad_k = kernels.rms_norm_backward(grad_k, k, k_norm.weight, k_norm.variance_epsilon)
        # all three linears read the same input: their gradients are added up
        grad = linear_backward(attention.q_proj, grad_q.flatten(1))
        linear_backward(attention.k_proj, grad_k.flatten(1), onto=grad)
        linear_backward(attention.v_proj, grad_v.flatten(1), onto=grad)
        grad = kernels.rms_norm_backward(grad, x, norm.weight, norm.variance_epsilon)
        return grad, None, None, None, None


class OutputAndMLP(torch.autograd.Function):
    """x [T, D] and the output of attention [T, H, d] -> the layer's output [T, D]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, attended: Tensor, layer: nn.Module, kernels: Kernels
    ) -> Tensor:
        norm, mlp = layer.post_attention_layernorm, layer.mlp
        x = add_linear(x, layer.self_attn.o_proj, attended.flatten(1))
        normed = kernels.rms_norm(x, norm.weight, norm.variance_epsilon)
        gate, up = linear(mlp.gate_proj, normed), linear(mlp.up_proj, normed)
        ctx.save_for_backward(x, gate, up)
        ctx.layer, ctx.kernels = layer, kernels
        ctx.shape = attended.shape
        return add_linear(x, mlp.down_proj, kernels.swiglu(gate, up))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *gate_and_up = ctx.saved_tensors
        norm, mlp = ctx.layer.post_attention_layernorm, ctx.layer.mlp
        kernels = ctx.kernels
        # the MLP, from its output to its input; a name for the inner result would keep [T, I] in memory
        grad_gate, grad_up = kernels.swiglu_backward(
            linear_backward(mlp.down_proj, grad), *gate_and_up
        )
        grad_normed = linear_backward(mlp.up_proj, grad_up)
        grad_normed = linear_backward(mlp.gate_proj, grad_gate, onto=grad_normed)
        # plus the gradient that bypasses the MLP in the residual stream
        grad = kernels.rms_norm_backward(grad_normed, x, norm.weight, norm.variance_epsilon, grad)
        grad_attended = linear_backward(ctx.layer.self_attn.o_proj, grad).view(ctx.shape)
        return grad, grad_attended, None, None


def fits(llm: nn.Module) -> bool:
    """Whether this module can run the LLM: layers like LLaMA's, with known linear layers and full attention."""
    config, layers = llm.config.get_text_config(), getattr(llm.get_decoder(), "layers", ())
    is_plain = (
        getattr(config, "hidden_act", None) == "silu"
        and getattr(config, "sliding_window", None) is None
    )
    return is_plain and len(layers) > 0 and all(map(_layer_fits, layers))


def _layer_fits(layer: nn.Module) -> bool:
    # exactly LLaMA's submodules, and head norms or not
    if dict(layer.named_children()).keys() != _PARTS.keys():
        return False
    for name, part in layer.named_children():
        own = dict(part.named_children()).keys()
        if own - (_HEAD_NORMS if _has_head_norms(part) else set()) != _PARTS[name]:
            return False
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if _has_head_norms(layer.self_attn):
        norms += [layer.self_attn.q_norm, layer.self_attn.k_norm]
    # all other submodules have to be linear layers whose backward is known
    others = {layer.mlp.act_fn, *norms}
    linears = [
        part for part in (*layer.self_attn.children(), *layer.mlp.children()) if part not in others
    ]
    is_known = all(
        type(part) is nn.Linear or quantization.has_product_backward(part) for part in linears
    )
    return is_known and all(hasattr(norm, "variance_epsilon") for norm in norms)


def _has_head_norms(attention: nn.Module) -> bool:
    return all(hasattr(attention, name) for name in _HEAD_NORMS)


def label_logits(
    llm: nn.Module,
    embeds: Tensor,
    positions: Tensor,
    segments: Segments,
    predicting: Tensor,
    recompute: bool = False,
    kernels: Kernels = EAGER,
) -> Tensor:
    """Return the logits [N, V] at the positions `predicting` [N] of packed embeddings [T, D]."""
    run = sharding.gathered(llm, _label_logits)
    return run(llm, embeds, positions, segments, predicting, recompute, kernels)


def _label_logits(llm, embeds, positions, segments, predicting, recompute, kernels):
    model, x = llm.get_decoder(), embeds
    cos, sin = model.rotary_emb(embeds[None], positions[None])  # [1, T, d]
    cos, sin = cos.transpose(0, 1), sin.transpose(0, 1)  # [T, 1, d]
    sin = sin.chunk(2, dim=-1)[0]  # its halves are equal
    run_layer = partial(checkpointing.recompute, _run_layer) if recompute else _run_layer
    for layer in model.layers:
        # only logits at `predicting` are needed, so the last layer's MLP computes nothing else
        wanted = predicting if layer is model.layers[-1] else None
        x = sharding.gathered(layer, run_layer)(layer, x, cos, sin, segments, wanted, kernels)
    return llm.get_output_embeddings()(model.norm(x))


def compiled_label_logits(*args: Any) -> Tensor:
    """`label_logits` with compiled kernels."""
    return label_logits(*args, kernels=compiled())


def _run_layer(layer, x, cos, sin, segments, wanted, kernels):
    """Return the layer's output at the positions `wanted`, None for all."""
    q, *keys_values = QueryKeyValue.apply(x, cos, sin, layer, kernels)
    attended = attend(q, *keys_values, segments, layer.self_attn.scaling)
    if wanted is not None:
        x, attended = x[wanted], attended[wanted]
    return OutputAndMLP.apply(x, attended, layer, kernels)
