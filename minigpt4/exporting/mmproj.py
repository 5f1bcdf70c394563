"""`--to gguf`: the vision tower and projection in a file for llama.cpp's --mmproj, to go with any GGUF of the LLM.

llama.cpp's projector `mlp` is two layers with a GELU between them. As gelu(z) - gelu(-z) = z, our single layer W, b is
exactly mm.0 = [W; -W], [b; -b] and mm.2 = [I, -I]. llama.cpp's graph skips the last block in the file and applies a
norm, `v.post_ln`, after the block before it: we append a copy of our last block, which is never computed, and our
`ln_vision` becomes that norm. Source: llama.cpp, tools/mtmd.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minigpt4.common.image_format import ImageFormat
from minigpt4.exporting.blip2 import NORM_EPS
from minigpt4.exporting.llava import tower_tensors

if TYPE_CHECKING:
    import numpy as np

# (pattern of our towers' tensor names, llama.cpp's name)
_NAMES = (
    (r"(embeddings\.)?cls_token|(vision_model\.)?embeddings\.class_embedding", "v.class_embd"),
    (
        r"pos_embed|(vision_model\.)?embeddings\.position_embedding\.weight",
        "v.position_embd.weight",
    ),
    (
        r"(patch_embed\.proj|(vision_model\.)?embeddings\.patch_embedding)\.(weight|bias)",
        r"v.patch_embd.\3",
    ),
    (r"(vision_model\.)?pre_layrnorm\.(\w+)", r"v.pre_ln.\2"),
    (r"(?:.+\.)?(?:blocks|layers)\.(\d+)\.(?:norm|layer_norm)([12])\.(\w+)", r"v.blk.\1.ln\2.\3"),
    (
        r"(?:.+\.)?(?:blocks|layers)\.(\d+)\.(?:self_attn|attn)\.([qkv])_proj\.(\w+)",
        r"v.blk.\1.attn_\2.\3",
    ),
    (
        r"(?:.+\.)?(?:blocks|layers)\.(\d+)\.(?:self_attn\.out_proj|attn\.proj)\.(\w+)",
        r"v.blk.\1.attn_out.\2",
    ),
    (r"(?:.+\.)?(?:blocks|layers)\.(\d+)\.mlp\.fc1\.(\w+)", r"v.blk.\1.ffn_up.\2"),
    (r"(?:.+\.)?(?:blocks|layers)\.(\d+)\.mlp\.fc2\.(\w+)", r"v.blk.\1.ffn_down.\2"),
)
FAMILIES = ("eva_clip_g", "clip_vision_model", "siglip_vision_model")
# our activation -> the one that the file names; None: llama.cpp's default
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu", "quick_gelu": None}
_BLOCK = re.compile(r"v\.blk\.(\d+)\.")


def check_gguf(model: nn.Module) -> None:
    """Raise ValueError, with the reason, for a model that no projector type of llama.cpp can represent."""
    if model.bridge == "none" and model.tower_name in FAMILIES:
        return
    reason = f"bridge {model.bridge}, tower {model.tower_name}"
    raise ValueError(
        f"model.bridge: llama.cpp has no projector for this model ({reason}); it can hold the bridge none behind one "
        f"of {', '.join(FAMILIES)}. Serve it by minigpt4.serve"
    )


def write_gguf(model: nn.Module, image: ImageFormat, path: Path, name: str) -> None:
    """Write the file at `path`, in float32. Raises ValueError as `check_gguf`."""
    from gguf import GGUFWriter

    check_gguf(model)
    tensors = vision_tensors(model) | projector_tensors(model)
    settings = vision_settings(model)
    writer = GGUFWriter(path, "clip")
    writer.add_name(name)
    writer.add_description("vision tower and projection of a MiniGPT-4")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_bool("clip.has_llava_projector", True)
    # what llama.cpp needs to preprocess images and to build the tower
    writer.add_vision_image_size(image.size)
    writer.add_vision_image_mean(list(image.mean))
    writer.add_vision_image_std(list(image.std))
    writer.add_vision_patch_size(settings["patch_size"])
    writer.add_vision_embedding_length(model.ln_vision.weight.shape[0])
    writer.add_vision_feed_forward_length(len(tensors["v.blk.0.ffn_up.bias"]))
    blocks = {int(match[1]) for match in map(_BLOCK.match, tensors) if match}
    writer.add_vision_block_count(1 + max(blocks))
    writer.add_vision_head_count(settings["heads"])
    writer.add_vision_attention_layernorm_eps(settings["eps"])
    writer.add_vision_projection_dim(len(tensors["mm.2.bias"]))
    if _ACTIVATIONS[settings["act"]] == "gelu":
        writer.add_vision_use_gelu(True)
    for key, tensor in tensors.items():
        writer.add_tensor(key, _array(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def vision_settings(model: nn.Module) -> dict[str, Any]:
    """Return {"patch_size", "heads", "eps", "act"} of a tower."""
    vit = model.visual_encoder
    if model.tower_name == "eva_clip_g":
        return {
            "patch_size": vit.patch_embed.patch_size[0],
            "heads": vit.blocks[0].attn.num_heads,
            "eps": NORM_EPS,
            "act": "gelu",
        }
    config = vit.model.config
    return {
        "patch_size": config.patch_size,
        "heads": config.num_attention_heads,
        "eps": config.layer_norm_eps,
        "act": config.hidden_act,
    }


def vision_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the tower's tensors under llama.cpp's names, with a copy of the last block appended, and `v.post_ln`."""
    tower, found = model.visual_encoder, {}
    is_eva = (
        model.tower_name == "eva_clip_g"
    )  # whose position embeddings were resampled when they were loaded
    tensors = tower.state_dict() if is_eva else tower_tensors(tower, model.image_size)
    for full_name, tensor in tensors.items():
        for name, part in _split(full_name.removeprefix("model."), tensor).items():
            found[_renamed(name)] = part
    # llama.cpp expects these without the batch dimension: [positions, width] and [width].
    width = model.ln_vision.weight.shape[0]
    found["v.position_embd.weight"] = found["v.position_embd.weight"].reshape(-1, width)
    if "v.class_embd" in found:
        found["v.class_embd"] = found["v.class_embd"].flatten()
    # the copy of the last block, which llama.cpp skips
    num_blocks = len(model.visual_encoder.blocks)
    last, copy = f"v.blk.{num_blocks - 1}.", f"v.blk.{num_blocks}."
    found |= {
        key.replace(last, copy, 1): tensor for key, tensor in found.items() if key.startswith(last)
    }
    for kind in ("weight", "bias"):
        found[f"v.post_ln.{kind}"] = getattr(model.ln_vision, kind)
    return found


def _renamed(name: str) -> str:
    """Return llama.cpp's name of a tensor. Raises KeyError for an unknown one."""
    for pattern, theirs in _NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(theirs)
    raise KeyError(name)


def _split(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a tensor by name, EVA's joined query, key and value as three; {} for a constant, which is left out."""
    if name.endswith("position_ids"):
        return {}
    if name.endswith(".attn.qkv.weight"):
        prefix = name.removesuffix("qkv.weight")
        return {
            f"{prefix}{kind}_proj.weight": part
            for kind, part in zip("qkv", tensor.chunk(3), strict=True)
        }
    if name.endswith(".attn.q_bias"):
        prefix = name.removesuffix("q_bias")
        return {f"{prefix}q_proj.bias": tensor, f"{prefix}k_proj.bias": torch.zeros_like(tensor)}
    if name.endswith(".attn.v_bias"):
        return {name.replace("v_bias", "v_proj.bias"): tensor}
    return {name: tensor}


def projector_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return mm.0 and mm.2: our two layers unchanged, or our single one by gelu(z) - gelu(-z) = z."""
    ours = model.llama_proj.state_dict()
    if model.projector != "linear":
        return {f"mm.{name}": tensor for name, tensor in ours.items()}
    weight, bias = ours["weight"], ours["bias"]
    identity = torch.eye(len(weight))
    return {
        "mm.0.weight": torch.cat([weight, -weight]),
        "mm.0.bias": torch.cat([bias, -bias]),
        "mm.2.weight": torch.cat([identity, -identity], 1),
        "mm.2.bias": torch.zeros(len(weight)),
    }


def _array(tensor: torch.Tensor) -> "np.ndarray":
    return tensor.detach().float().contiguous().numpy()
