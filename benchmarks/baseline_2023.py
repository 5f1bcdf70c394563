"""The 2023 baseline: what the 2023 release computes in a training step, written plainly over the modules of our own model.

Texts are padded to the longest of the batch, and the LLM reads them to their last token, which predicts nothing; attention
is matrix products with a mask and a float32 softmax; logits are computed at all positions. tests/test_baseline.py checks
loss and gradient against the golden set.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu, softmax
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from benchmarks.workload import IGNORED, llm_inputs


def loss(model: nn.Module, samples: dict) -> Tensor:
    """Return the loss of a batch {"image", "text_input"}, as `model(samples)["loss"]` would."""
    with plain_vision(model):
        inputs = llm_inputs(model, samples)
    with model.maybe_autocast():
        # as in 2023, keys and values take memory until the loss is computed, though nothing reads them
        logits, _keys_and_values = llm_logits(
            model.llama_model, inputs["inputs_embeds"], inputs["attention_mask"]
        )
        logits = logits[:, :-1].contiguous().flatten(0, 1)
        targets = inputs["labels"][:, 1:].flatten()
        return cross_entropy(logits.float(), targets, ignore_index=IGNORED)


@contextmanager
def plain_vision(model: nn.Module) -> Iterator[None]:
    """Let ViT and Q-Former compute attention by plain matrix products inside the block."""
    bert, attentions = (model.Qformer.bert, [block.attn for block in model.visual_encoder.blocks])
    usual = bert.config._attn_implementation
    fused = [attention.fused_attn for attention in attentions]
    bert.config._attn_implementation = "eager"
    for attention in attentions:
        attention.fused_attn = False
    try:
        yield
    finally:
        bert.config._attn_implementation = usual
        for attention, value in zip(attentions, fused, strict=True):
            attention.fused_attn = value


def llm_logits(
    llm: nn.Module, x: Tensor, mask: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return logits [B, L, V], and each layer's keys and values, of a LLaMA for embeddings x [B, L, D].

    `mask` [B, L]: 0 where padded.
    """
    length, lowest = x.shape[1], torch.finfo(x.dtype).min
    is_later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    hidden = is_later | (mask[:, None, None] == 0)  # [B, 1, L, L]
    bias = torch.zeros(hidden.shape, dtype=x.dtype, device=x.device).masked_fill(hidden, lowest)
    positions = torch.arange(length, device=x.device)[None]
    cos, sin = llm.model.rotary_emb(x, positions)  # [1, L, d]
    keys_and_values = []
    for layer in llm.model.layers:
        attended, k, v = _attention(
            layer.self_attn, _norm(layer.input_layernorm, x), cos, sin, bias, lowest
        )
        x = x + attended
        keys_and_values.append((k, v))
        normed, mlp = _norm(layer.post_attention_layernorm, x), layer.mlp
        x = x + mlp.down_proj(silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
    return llm.lm_head(_norm(llm.model.norm, x)), keys_and_values


def _norm(norm, x):
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return norm.weight * (x * torch.rsqrt(variance + norm.variance_epsilon)).to(norm.weight.dtype)


def _attention(attention, x, cos, sin, bias, lowest):
    """Return the attention block's output [B, L, D], keys and values [B, heads, L, d]; `bias` is added to the scores."""

    def heads(linear):
        return linear(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    q, k = apply_rotary_pos_emb(heads(attention.q_proj), heads(attention.k_proj), cos, sin)
    v = heads(attention.v_proj)
    keys, values = (
        each.repeat_interleave(attention.num_key_value_groups, dim=1) for each in (k, v)
    )
    scores = q @ keys.transpose(2, 3) / attention.head_dim**0.5 + bias
    scores = scores.clamp(min=lowest)
    probabilities = softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return attention.o_proj((probabilities @ values).transpose(1, 2).flatten(2)), k, v
