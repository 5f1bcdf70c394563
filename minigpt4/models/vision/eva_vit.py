"""EVA-CLIP's ViT, the vision encoder of 2023: its penultimate features, computed by timm's network.

Shapes: B images, S image size, N = (S / patch)^2 patches, D width.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from minigpt4.common import compiling
from minigpt4.common.dist_utils import main_print
from minigpt4.models import weights
from minigpt4.models.vision.tower import VisionTower


@dataclass(frozen=True)
class EvaVit(VisionTower):
    """Dimensions of an EVA ViT; a weight file with others needs a JSON sidecar of the same stem.

    The network returns tokens [B, 1 + N, D], the class token first, without a final norm. Its parameters have the names
    of the released file.
    """

    embed_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    patch_size: int
    image_size: int = 224

    @property
    def width(self) -> int:
        return self.embed_dim

    def num_tokens(self, image_size: int) -> int:
        return 1 + (image_size // self.patch_size) ** 2

    def build(
        self, image_size: int, drop_path_rate: float = 0.0, device: str = "meta"
    ) -> nn.Module:
        """See VisionTower. Raises ValueError if patches do not tile the image."""
        from timm.models.eva import Eva

        if image_size % self.patch_size:
            raise ValueError(
                f"model.image_size: {image_size} is no multiple of the ViT's patch size {self.patch_size}"
            )
        vit = Eva(
            img_size=image_size,
            patch_size=self.patch_size,
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_ratio=(self.mlp_dim + 0.5) / self.embed_dim,  # timm truncates the product
            num_classes=0,
            global_pool="",
            use_post_transformer_norm=False,
            use_fc_norm=False,
            drop_path_rate=drop_path_rate,
            device=device,
        )
        # a constant that no weight file holds, so it is created on the CPU even if the rest is on the meta device
        for block in vit.blocks:
            block.attn.k_bias = torch.zeros(self.embed_dim)
        return vit

    def load(self, network: nn.Module, path: Path, where: str, hint: str = "") -> None:
        """See VisionTower; the position embedding is resampled to the network's image size if necessary.

        Tensors that need no conversion stay memory-mapped to the file.
        """
        tensors = weights.read_tensors(path, where)
        found = resize_pos_embed(tensors, network.patch_embed.grid_size[0])
        excess = weights.last_block_excess(self.depth)
        found = weights.match(found, network.state_dict(), where, path, excess, hint=hint)
        weights.check_finite(found, where, path)
        weights.assign(network, found)


# Source: BLIP-2, which uses 39 of EVA-CLIP-g's 40 blocks.
VIT_MODELS = {
    "eva_clip_g": EvaVit(embed_dim=1408, depth=39, num_heads=16, mlp_dim=6144, patch_size=14)
}


def half_linears(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert the linear and convolution layers of `module` to `dtype`; norms, tokens and q/v biases keep their type.

    Source: MiniGPT-4 2023. As position embeddings stay in float32, so does the residual stream under autocast.
    """
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            part.to(dtype)


def compile_blocks(vit: nn.Module, device: torch.device) -> None:
    """Have torch.compile compile the network's blocks when they first run on `device`.

    Raises ValueError if torch.compile does not work on `device`.
    """
    if reason := compiling.obstacle(device):
        raise ValueError(
            f"model.compile: torch.compile does not work on {device} ({reason}); install a C++ compiler, or set "
            "model.compile=False"
        )
    for block in vit.blocks:
        compiling.compile_module(block)


def resize_pos_embed(
    tensors: dict[str, torch.Tensor], grid: int, num_prefix: int = 1
) -> dict[str, torch.Tensor]:
    """Return `tensors` with `pos_embed` [1, P + N, D] resampled to grid x grid patches; the P prefix tokens keep theirs.

    One of another shape, whose N is no square, is left for `weights.match` to refuse.
    """
    from timm.layers import resample_abs_pos_embed

    shape = tensors["pos_embed"].shape if "pos_embed" in tensors else ()
    num_patches = shape[1] - num_prefix if len(shape) == 3 else 0
    old = math.isqrt(max(num_patches, 0))
    if old == grid or old == 0 or old**2 != num_patches:
        return tensors
    main_print(f"Position interpolate from {old}x{old} to {grid}x{grid}")
    sizes = {"new_size": [grid, grid], "old_size": [old, old], "num_prefix_tokens": num_prefix}
    resized = resample_abs_pos_embed(tensors["pos_embed"].float(), **sizes, antialias=False)
    return {**tensors, "pos_embed": resized}
