"""The vision encoder: EVA-CLIP's ViT, penultimate features, on timm's network.

Shapes: B images, S image size, N = (S / patch)^2 patches, D width.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from minigpt4.common.dist_utils import main_print
from minigpt4.models import weights
from minigpt4.models.base_model import ImageFormat


@dataclass(frozen=True)
class EvaVitConfig:
    """Dimensions of a ViT; a weight file of other ones has them beside it, in a JSON file of the same stem."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    patch_size: int


# Source: BLIP-2; 39 of EVA-CLIP-g's 40 blocks.
VIT_MODELS = {"eva_clip_g": EvaVitConfig(embed_dim=1408, depth=39, num_heads=16, mlp_dim=6144, patch_size=14)}
# Source: CLIP.
IMAGE_FORMAT = ImageFormat(224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def build_eva_vit(config, image_size, drop_path_rate=0.0, device="meta"):
    """Return the network: image [B, 3, S, S] -> tokens [B, 1 + N, D], the class token first, without a last norm.

    Parameters have the released file's names. On the meta device nothing is initialised: fill it with
    `load_state_dict(..., assign=True)`. Raises ValueError if patches do not tile the image.
    """
    from timm.models.eva import Eva

    if image_size % config.patch_size:
        raise ValueError(f"model.image_size: {image_size} is no multiple of the ViT's patch size {config.patch_size}")
    vit = Eva(
        img_size=image_size,
        patch_size=config.patch_size,
        embed_dim=config.embed_dim,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=(config.mlp_dim + 0.5) / config.embed_dim,  # timm truncates the product
        num_classes=0,
        global_pool="",
        use_post_transformer_norm=False,
        use_fc_norm=False,
        drop_path_rate=drop_path_rate,
        device=device,
    )
    for block in vit.blocks:  # a constant that no file holds: real also where the rest is still meta
        block.attn.k_bias = torch.zeros(config.embed_dim)
    return vit


def half_linears(module, dtype):
    """Give every linear and convolution of `module` the type `dtype`; norms, tokens and q/v biases keep theirs.

    Source: MiniGPT-4 2023. Position embeddings in float32 keep the residual stream in float32 under autocast.
    """
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            part.to(dtype)


def compile_blocks(vit, device):
    """Let torch compile the network's blocks, which are alike, when they first run on `device`.

    Raises ValueError where nothing can be compiled.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # of many kinds, from Dynamo to the linker
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.compile: torch.compile does not work on {device} ({reason}); install a C++ compiler, or set "
            "model.compile=False"
        ) from error
    for block in vit.blocks:
        block.compile()


def load_eva_vit(vit, path, where, hint=""):
    """Fill a network of `build_eva_vit` with the tensors of a file, its position embedding resampled if need be.

    Tensors of the planned type stay mapped to the file. Raises CheckpointError (with `hint`) if the file does not fit.
    """
    found = resize_pos_embed(weights.read_tensors(path, where), vit.patch_embed.grid_size[0])
    excess = weights.last_block_excess(len(vit.blocks))
    weights.assign(vit, weights.match(found, vit.state_dict(), where, path, excess, hint=hint))


def resize_pos_embed(tensors, grid):
    """Return `tensors` with `pos_embed` [1, 1 + N, D] resampled to grid x grid patches, the class token's kept."""
    from timm.layers import resample_abs_pos_embed

    if "pos_embed" not in tensors:
        return tensors
    old = math.isqrt(tensors["pos_embed"].shape[1] - 1)
    if old == grid:
        return tensors
    main_print(f"Position interpolate from {old}x{old} to {grid}x{grid}")
    resized = resample_abs_pos_embed(
        tensors["pos_embed"].float(), new_size=[grid, grid], old_size=[old, old], num_prefix_tokens=1, antialias=False
    )
    return {**tensors, "pos_embed": resized}
