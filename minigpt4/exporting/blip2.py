"""Export a model with a Q-Former as transformers' Blip2ForConditionalGeneration."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from minigpt4.exporting import names

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import Blip2ForConditionalGeneration, Blip2VisionConfig, PreTrainedConfig

# Epsilon of the layer norms in timm's blocks; that of ln_vision, 1e-5, has no place in the class: see docs/serving.md.
NORM_EPS = 1e-6


def text_config(model: nn.Module) -> "PreTrainedConfig":
    """Return a copy of the LLM's configuration, without the path that it was read from."""
    config = copy.deepcopy(model.llama_model.config)
    config._name_or_path = ""
    return config


def vision_config(model: nn.Module) -> "Blip2VisionConfig":
    """Return the configuration of an EVA-CLIP tower followed by `ln_vision`."""
    from transformers import Blip2VisionConfig

    vit = model.visual_encoder
    block = vit.blocks[0]
    return Blip2VisionConfig(
        hidden_size=vit.embed_dim,
        intermediate_size=block.mlp.fc1.out_features,
        num_hidden_layers=len(vit.blocks),
        num_attention_heads=block.attn.num_heads,
        image_size=model.image_size,
        patch_size=vit.patch_embed.patch_size[0],
        layer_norm_eps=NORM_EPS,
    )


def to_blip2(model: nn.Module, image_token_id: int) -> "Blip2ForConditionalGeneration":
    """Return a MiniGPT4 with a Q-Former as transformers' class; no tensor is cast, and none but the qkv biases copied."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    config = Blip2Config(
        vision_config=vision_config(model),
        qformer_config=model.Qformer.bert.config,
        text_config=text_config(model),
        num_query_tokens=model.query_tokens.shape[1],
        image_token_index=image_token_id,
        tie_word_embeddings=model.llama_model.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        exported = Blip2ForConditionalGeneration(config)
    state = names.to_transformers(model.state_dict(), names.BLIP2)
    exported.load_state_dict(state, assign=True)
    exported.tie_weights()
    return exported.eval()
