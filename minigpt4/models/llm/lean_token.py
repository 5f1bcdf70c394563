"""A decoding step through LLaMA's layers with few kernels, for a GPU to replay as a CUDA graph.

Like lean.py, but for one token and without backward: the operations between two matrix products are one compiled
kernel, and attention reads only the filled positions of the KV cache. The result is that of transformers.

Shapes: S positions in the buffers, D width, H query heads, K key heads, d head width, V vocabulary.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from minigpt4.common import compiling
from minigpt4.models.llm import lean
from minigpt4.models.llm.attention import has_flash
from minigpt4.models.llm.quantised_layers import Int4Linear

# families whose layers are always exactly LLaMA's, whatever their configuration says
FAMILIES = ("llama", "mistral", "qwen2")


def add_norm(
    x: Tensor, update: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return (x + update [1, D], its RMS norm in `dtype`)."""
    x = x + update.to(x.dtype)
    return x, lean.rms_norm(x, weight, eps).to(dtype)


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
) -> Tensor:
    """Store k, rotated, and v [1, K, d] in keys and values [S, K, d] at `position` [1]; return q [1, H, d] rotated."""
    keys.index_copy_(0, position, lean.rotate(k, cos, sin).to(keys.dtype))
    values.index_copy_(0, position, v.to(values.dtype))
    return lean.rotate(q, cos, sin).to(keys.dtype)


class Kernels(NamedTuple):
    """The operations of a layer between its matrix products."""

    add_norm: Callable = add_norm
    rotate_and_store: Callable = rotate_and_store
    swiglu: Callable = lean.swiglu


EAGER = Kernels()


@cache
def compiled(device: torch.device) -> Kernels:
    """Return the Kernels compiled by torch.compile; where that does not work, a warning, and they are not compiled."""
    if reason := compiling.obstacle(device):
        logging.warning("chat: answers run slower here, torch.compile fails: %s", reason)
        return EAGER
    return Kernels(*(compiling.kernel(each, dynamic=False) for each in EAGER))


def fits(llm: nn.Module) -> bool:
    """Whether LeanToken can run the LLM: a known family without hooks, which LeanToken would not call."""
    is_known = getattr(llm.config, "model_type", None) in FAMILIES and hasattr(llm, "get_decoder")
    if not (is_known and lean.fits(llm)):
        return False
    return not any(
        module._forward_hooks or module._forward_pre_hooks for module in llm.get_decoder().modules()
    )


class LeanToken:
    """Runs the LLM for one token of one sequence, with a KV cache in buffers of `size` positions."""

    def __init__(self, llm: nn.Module, past: DynamicCache, size: int):
        weight = llm.get_input_embeddings().weight
        self.llm, self.model = llm, llm.get_decoder()
        device = weight.device
        # the 4-bit kernels take and return bfloat16, so the operations between them use it too
        has_int4 = isinstance(self.model.layers[0].mlp.down_proj, Int4Linear)
        self.dtype = torch.bfloat16 if has_int4 and weight.is_cuda else weight.dtype
        self.kernels = compiled(device) if weight.is_cuda else EAGER
        self.is_flash = has_flash(device, self.dtype)
        self.keys, self.values = [], []
        for layer in past.layers:
            shape = (size, layer.keys.shape[1], layer.keys.shape[3])
            for buffers in (self.keys, self.values):
                buffers.append(torch.zeros(shape, dtype=self.dtype, device=device))
        self.slots = torch.arange(size, device=device)
        # of queries and of keys: cumulative lengths for the fused kernel
        self.limits = [
            torch.tensor([0, end], dtype=torch.int32, device=device) for end in (1, size)
        ]

    def load(self, past: DynamicCache, end: int) -> None:
        """Copy `past`, of `end` positions, into the buffers."""
        for keys, values, theirs in zip(self.keys, self.values, past.layers, strict=True):
            keys[:end] = theirs.keys[0].transpose(0, 1)
            values[:end] = theirs.values[0].transpose(0, 1)

    def store(self, past: DynamicCache, new: slice) -> None:
        """Append the positions `new` of the buffers to `past`."""
        for keys, values, theirs in zip(self.keys, self.values, past.layers, strict=True):
            parts = (
                each[new].transpose(0, 1)[None].to(theirs.keys.dtype) for each in (keys, values)
            )
            theirs.update(*parts)

    def logits(self, token: Tensor, position: Tensor) -> Tensor:
        """Return the logits [1, V] of `token` [1] at `position` [1], the first that is not filled yet."""
        x = self.model.embed_tokens(token)  # [1, D]
        cos, sin = self.model.rotary_emb(x[None], position[None])  # [1, 1, d]
        cos, sin = cos.transpose(0, 1), sin.transpose(0, 1)
        angles = (cos, sin.chunk(2, dim=-1)[0])  # the halves of the sines are equal
        # the fused kernel takes the number of filled positions, other attention a mask
        filled = (
            (position + 1).int() if self.is_flash else (self.slots <= position)[None, None, None]
        )
        # a block's update is added in one kernel with the norm that follows it
        update = torch.zeros_like(x)
        for layer, *buffers in zip(self.model.layers, self.keys, self.values, strict=True):
            x, normed = self._add_norm(x, update, layer.input_layernorm, self.dtype)
            update = self._attention(layer.self_attn, normed, angles, buffers, position, filled)
            x, normed = self._add_norm(x, update, layer.post_attention_layernorm, self.dtype)
            gate = lean.linear(layer.mlp.gate_proj, normed)
            up = lean.linear(layer.mlp.up_proj, normed)
            update = lean.linear(layer.mlp.down_proj, self.kernels.swiglu(gate, up))
        _, normed = self._add_norm(x, update, self.model.norm, x.dtype)
        return self.llm.get_output_embeddings()(normed)

    def _add_norm(
        self, x: Tensor, update: Tensor, norm: nn.Module, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return self.kernels.add_norm(x, update, norm.weight, norm.variance_epsilon, dtype)

    def _attention(self, module, x, angles, buffers, position, filled):
        """Return the update [1, D] of the residual stream; the new key and value are stored in `buffers`."""
        projections = (module.q_proj, module.k_proj, module.v_proj)
        heads = [
            lean.linear(projection, x).unflatten(1, (-1, module.head_dim))
            for projection in projections
        ]
        q = self.kernels.rotate_and_store(*heads, *angles, *buffers, position)
        keys, values = buffers
        if self.is_flash:
            limits = (*self.limits, 1, len(keys))
            options = {"scale": module.scaling, "seqused_k": filled}
            attended = torch.ops.aten._flash_attention_forward(
                q, keys, values, *limits, 0.0, False, False, **options
            )[0]
        else:
            options = {"scale": module.scaling, "enable_gqa": q.shape[1] != keys.shape[1]}
            by_head = [each.transpose(0, 1)[None] for each in (q, keys, values)]
            attended = F.scaled_dot_product_attention(*by_head, filled, **options)[0]
            attended = attended.transpose(0, 1)
        return lean.linear(module.o_proj, attended.flatten(1))
