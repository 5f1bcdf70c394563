"""Rename our tensors to the names of transformers' classes, and back.

All tensors keep their values. `qkv.bias` is the query's and the value's bias with zeros, for the key, between them.
"""

import re
from collections.abc import Iterable

import torch

Tensors = dict[str, torch.Tensor]
Table = tuple[tuple[str, str], ...]

# Pairs (start of our names, start of transformers' names); {} is the index of a layer. Source: transformers' blip_2.
_VIT = (
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("visual_encoder.blocks.{}.norm1.", "vision_model.encoder.layers.{}.layer_norm1."),
    ("visual_encoder.blocks.{}.norm2.", "vision_model.encoder.layers.{}.layer_norm2."),
    ("visual_encoder.blocks.{}.attn.qkv.", "vision_model.encoder.layers.{}.self_attn.qkv."),
    ("visual_encoder.blocks.{}.attn.proj.", "vision_model.encoder.layers.{}.self_attn.projection."),
    ("visual_encoder.blocks.{}.mlp.", "vision_model.encoder.layers.{}.mlp."),
    ("ln_vision.", "vision_model.post_layernorm."),
)
BLIP2 = (
    *_VIT,
    ("query_tokens", "query_tokens"),
    ("Qformer.bert.", "qformer."),
    ("llama_proj.", "language_projection."),
    ("llama_model.", "language_model."),
)
_LLAVA = (("llama_model.model.", "model.language_model."), ("llama_model.lm_head.", "lm_head."))
LLAVA_SIGLIP = (
    ("visual_encoder.model.", "model.vision_tower."),
    ("ln_vision.", "model.vision_tower.post_layernorm."),
    *_LLAVA,
)
# For the import of a Llava: the names in its files, where save_pretrained gives other ones than the class has.
_LLAVA_FILES = (
    ("ln_vision.", "vision_tower.post_layernorm."),
    ("visual_encoder.model.", "vision_tower."),
    ("llama_model.", "language_model."),
)
LLAVA_LINEAR = (*_LLAVA_FILES, ("llama_proj.", "multi_modal_projector.linear_1."))
LLAVA_MLP = (
    *_LLAVA_FILES,
    ("llama_proj.0.", "multi_modal_projector.linear_1."),
    ("llama_proj.2.", "multi_modal_projector.linear_2."),
)
POSITIONS = "position_embedding"  # in the names of CLIP's and SigLIP's
_QKV_BIAS = re.compile(r"(visual_encoder\.blocks\.\d+\.attn\.)qkv\.bias")


def to_transformers(tensors: Tensors, table: Table) -> Tensors:
    """Return our tensors under transformers' names, without those of LoRA, which has been merged.

    Raises KeyError for a tensor that the table does not know.
    """
    tensors = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in tensors.items()
        if ".lora_" not in name
    }
    # EVA's attention has biases of query and value only; transformers' has one for all three.
    for name in [name for name in tensors if name.endswith(".attn.q_bias")]:
        query, value = tensors.pop(name), tensors.pop(name.replace("q_bias", "v_bias"))
        key = torch.zeros_like(query)
        tensors[name.replace("q_bias", "qkv.bias")] = torch.cat([query, key, value])
    return {_renamed(name, table): tensor for name, tensor in tensors.items()}


def from_transformers(tensors: Tensors, table: Table) -> Tensors:
    """Return the tensors that the table knows under our names: the inverse of `to_transformers`."""
    inverse = tuple((theirs, ours) for ours, theirs in table)
    found = {}
    for name, tensor in tensors.items():
        try:
            ours = _renamed(name, inverse)
        except KeyError:
            continue
        if match := _QKV_BIAS.fullmatch(ours):
            query, value = tensor.chunk(3)[::2]
            found |= {f"{match[1]}q_bias": query.clone(), f"{match[1]}v_bias": value.clone()}
        else:
            found[ours] = tensor
    return found


def why_lost(tensors: Iterable[str]) -> str:
    """Return why an export does not hold these tensors of its checkpoint, "" for none that it changes."""
    if any(".lora_" in name for name in tensors):
        return "LoRA was merged into the LLM, for good"
    if any(POSITIONS in name for name in tensors):
        return "the tower's position embeddings were resampled to model.image_size"
    return ""


def _renamed(name: str, table: Table) -> str:
    """Return the name with its start replaced by the first pair that fits. Raises KeyError if none does."""
    for old, new in table:
        if match := re.match(re.escape(old).replace(r"\{\}", r"(\d+)"), name):
            return new.format(*match.groups()) + name[match.end() :]
    raise KeyError(name)
