"""One token through LLaMA's layers, from few kernels: what a GPU replays as a graph while it answers.

As lean.py, for one position and forward alone: what lies between the matrix products is one compiled kernel each time,
attention reads the positions that are filled. What is computed is what transformers computes.

Shapes: S positions that the buffers hold, D width, H query heads, K key heads, d head width, V vocabulary.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache

from minigpt4.models.llm import lean
from minigpt4.models.llm.attention import has_flash
from minigpt4.models.llm.quantised_layers import Int4Linear

# families whose layers are LLaMA's and nothing more, whatever the numbers in their configuration
FAMILIES = ("llama", "mistral", "qwen2")


def add_norm(
    x: Tensor, more: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return (x + more [1, D], its norm in `dtype`)."""
    x = x + more.to(x.dtype)
    return x, lean.rms_norm(x, weight, eps).to(dtype)


def turn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
) -> Tensor:
    """Write k, turned, and v [1, K, d] into keys and values [S, K, d] at `position` [1]; return q [1, H, d], turned."""
    keys.index_copy_(0, position, lean.rotate(k, cos, sin).to(keys.dtype))
    values.index_copy_(0, position, v.to(values.dtype))
    return lean.rotate(q, cos, sin).to(keys.dtype)


class Kernels(NamedTuple):
    """What a layer does between its matrix products."""

    add_norm: Callable = add_norm
    turn: Callable = turn
    swiglu: Callable = lean.swiglu


EAGER = Kernels()


@cache
def compiled(device: torch.device) -> Kernels:
    """Return the Kernels of torch.compile, or, with a warning, as they are where it does not work."""
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # of many kinds, from Dynamo to the linker
        logging.warning(
            "chat: answers run slower here, torch.compile fails: %s",
            str(error).strip().splitlines()[0],
        )
        return EAGER
    return Kernels(*(torch.compile(kernel, dynamic=False) for kernel in EAGER))


def fits(llm: nn.Module) -> bool:
    """Whether the LLM is one whose token LeanToken computes: modules with hooks it would not call."""
    is_known = getattr(llm.config, "model_type", None) in FAMILIES and hasattr(llm, "get_decoder")
    if not (is_known and lean.fits(llm)):
        return False
    return not any(
        module._forward_hooks or module._forward_pre_hooks for module in llm.get_decoder().modules()
    )


class LeanToken:
    """The LLM for one token of one row, over keys and values in buffers of `size` positions."""

    def __init__(self, llm: nn.Module, past: DynamicCache, size: int):
        weight = llm.get_input_embeddings().weight
        self.llm, self.model = llm, llm.get_decoder()
        device = weight.device
        # kernels of 4 bits take and give bfloat16: so does what lies between them
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
        self.limits = [
            torch.tensor([0, end], dtype=torch.int32, device=device) for end in (1, size)
        ]

    def load(self, past: DynamicCache, end: int) -> None:
        """Take the `end` positions of `past`."""
        for keys, values, theirs in zip(self.keys, self.values, past.layers, strict=True):
            keys[:end] = theirs.keys[0].transpose(0, 1)
            values[:end] = theirs.values[0].transpose(0, 1)

    def store(self, past: DynamicCache, new: slice) -> None:
        """Append the positions `new` to `past`."""
        for keys, values, theirs in zip(self.keys, self.values, past.layers, strict=True):
            parts = (
                each[new].transpose(0, 1)[None].to(theirs.keys.dtype) for each in (keys, values)
            )
            theirs.update(*parts)

    def logits(self, token: Tensor, position: Tensor) -> Tensor:
        """Return logits [1, V] of `token` [1] at `position` [1], behind which no position is filled."""
        x = self.model.embed_tokens(token)  # [1, D]
        # [1, 1, d]
        cos, sin = (each.transpose(0, 1) for each in self.model.rotary_emb(x[None], position[None]))
        angles = (cos, sin.chunk(2, dim=-1)[0])  # the halves of the sines are equal
        # what attention may see: a number of positions for the fused kernel, else a mask
        filled = (
            (position + 1).int() if self.is_flash else (self.slots <= position)[None, None, None]
        )
        more = torch.zeros_like(x)  # what a block adds, together with the norm behind it
        for layer, *buffers in zip(self.model.layers, self.keys, self.values, strict=True):
            x, normed = self._add_norm(x, more, layer.input_layernorm, self.dtype)
            attended = self._attention(layer.self_attn, normed, angles, buffers, position, filled)
            x, normed = self._add_norm(x, attended, layer.post_attention_layernorm, self.dtype)
            gate = lean.linear(layer.mlp.gate_proj, normed)
            up = lean.linear(layer.mlp.up_proj, normed)
            more = lean.linear(layer.mlp.down_proj, self.kernels.swiglu(gate, up))
        return self.llm.get_output_embeddings()(
            self._add_norm(x, more, self.model.norm, x.dtype)[1]
        )

    def _add_norm(
        self, x: Tensor, more: Tensor, norm: nn.Module, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return self.kernels.add_norm(x, more, norm.weight, norm.variance_epsilon, dtype)

    def _attention(self, part, x, angles, buffers, position, filled):
        """Return what attention adds to the residual stream, [1, D]; its keys and values go into `buffers`."""
        projections = (part.q_proj, part.k_proj, part.v_proj)
        heads = [
            lean.linear(projection, x).unflatten(1, (-1, part.head_dim))
            for projection in projections
        ]
        q, (keys, values) = self.kernels.turn(*heads, *angles, *buffers, position), buffers
        if self.is_flash:
            limits = (*self.limits, 1, len(keys))
            options = {"scale": part.scaling, "seqused_k": filled}
            found = torch.ops.aten._flash_attention_forward(
                q, keys, values, *limits, 0.0, False, False, **options
            )[0]
        else:
            options = {"scale": part.scaling, "enable_gqa": q.shape[1] != keys.shape[1]}
            by_head = [each.transpose(0, 1)[None] for each in (q, keys, values)]
            found = F.scaled_dot_product_attention(*by_head, filled, **options)[0].transpose(0, 1)
        return lean.linear(part.o_proj, found.flatten(1))
