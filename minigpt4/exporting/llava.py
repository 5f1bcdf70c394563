"""Export a model with SigLIP and no bridge as transformers' LlavaForConditionalGeneration.

Our `ln_vision` becomes the norm at the end of the tower; CLIP has no such norm. The class has a projector of two layers:
a linear projection becomes the first, with an identity as the second.
"""

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from minigpt4.exporting import names
from minigpt4.exporting.blip2 import text_config

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import LlavaForConditionalGeneration

# model_type of LLMs that consist of embeddings, layers, a norm and a head, and nothing else
LLMS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
SIGLIP = "siglip_vision_model"


def to_llava(model: nn.Module, image_token_id: int) -> "LlavaForConditionalGeneration":
    """Return a MiniGPT4 whose bridge is `none` as transformers' class; no tensor is cast."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = copy.deepcopy(model.visual_encoder.model.config)
    vision.tie_last_hidden_states = True  # the last hidden state is the one after the norm
    vision._name_or_path = ""
    vision.image_size = model.image_size
    state, act = projector_layers(model)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(model),
        image_token_index=image_token_id,
        image_seq_length=model.num_image_tokens,
        projector_hidden_act=act,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=model.llama_model.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        exported = LlavaForConditionalGeneration(config)
    others = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("llama_proj.")
    }
    tower = tower_tensors(model.visual_encoder, model.image_size)
    others |= {f"visual_encoder.{name}": tensor for name, tensor in tower.items()}
    state |= names.to_transformers(others, names.LLAVA_SIGLIP)
    exported.load_state_dict(state, assign=True)
    exported.tie_weights()
    return exported.eval()


@torch.no_grad()
def tower_tensors(network: nn.Module, image_size: int) -> names.Tensors:
    """Return the tensors of a CLIP or SigLIP tower; its forward pass would resample the position embeddings like this."""
    tensors = network.state_dict()
    (key,) = [name for name in tensors if names.POSITIONS in name]
    embeddings = network.get_submodule(key.partition(f".{names.POSITIONS}")[0])
    num_prefix = embeddings.num_positions - embeddings.num_patches
    num_tokens = num_prefix + (image_size // embeddings.patch_size) ** 2
    tokens = torch.empty(1, num_tokens, embeddings.embed_dim)  # only their shape counts
    return tensors | {key: embeddings.interpolate_pos_encoding(tokens, image_size, image_size)[0]}


def projector_layers(model: nn.Module) -> tuple[names.Tensors, str]:
    """Return (tensors of the class's projector, name of the activation between its two layers)."""
    prefix, ours = "model.multi_modal_projector", model.llama_proj.state_dict()
    if model.projector != "linear":
        return {f"{prefix}.{_layer_name(name)}": tensor for name, tensor in ours.items()}, "gelu"
    width = len(ours["weight"])
    layers = {f"{prefix}.linear_1.{kind}": tensor for kind, tensor in ours.items()}
    layers[f"{prefix}.linear_2.weight"] = torch.eye(width)
    layers[f"{prefix}.linear_2.bias"] = torch.zeros(width)
    return layers, "linear"


def _layer_name(name: str) -> str:
    """Return the class's name for a tensor of our two-layer projector, such as "0.weight"."""
    return name.replace("0.", "linear_1.").replace("2.", "linear_2.")
