"""Vision towers of timm, given by name and weight file: plain ViTs, of which the penultimate features are used."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import nn

from minigpt4.models import weights
from minigpt4.models.vision.eva_vit import resize_pos_embed
from minigpt4.models.vision.tower import VisionTower, check_patches


@dataclass(frozen=True)
class TimmVit(VisionTower):
    """A ViT of timm's class VisionTransformer; made by `of_name`."""

    name: str
    width: int
    depth: int  # of timm's model; the last block is not computed
    patch_size: int
    image_size: int
    num_prefix: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    @lru_cache
    def of_name(cls, name: str) -> "TimmVit":
        """Return the tower of a timm model name. Raises ValueError if the model is not a plain ViT."""
        import timm
        import torch

        with torch.device("meta"):
            vit = timm.create_model(name, pretrained=False)
        found, embed = type(vit).__name__, type(getattr(vit, "patch_embed", None)).__name__
        if found == "VisionTransformer" and embed != "PatchEmbed":
            found += f" behind a {embed}"  # such as a CNN
        if found != "VisionTransformer":
            raise ValueError(
                f"model.vision_model: timm's {name} is a {found}; expected a plain ViT (VisionTransformer)"
            )
        (patch, *_), (size, *_) = vit.patch_embed.patch_size, vit.patch_embed.img_size
        numbers = (vit.embed_dim, len(vit.blocks), patch, size, vit.num_prefix_tokens)
        return cls(
            name, *numbers, tuple(vit.pretrained_cfg["mean"]), tuple(vit.pretrained_cfg["std"])
        )

    def num_tokens(self, image_size: int) -> int:
        return self.num_prefix + (image_size // self.patch_size) ** 2

    def build(
        self, image_size: int, drop_path_rate: float = 0.0, device: str = "meta"
    ) -> nn.Module:
        """See VisionTower. Raises ValueError if patches do not tile the image."""
        import timm
        import torch

        check_patches(image_size, self.patch_size)
        options = {
            "num_classes": 0,
            "global_pool": "",
            "img_size": image_size,
            "drop_path_rate": drop_path_rate,
        }
        with torch.device(device):
            vit = timm.create_model(self.name, pretrained=False, **options)
        del vit.blocks[-1]
        vit.norm = nn.Identity()
        return vit

    def load(self, network: nn.Module, path: Path, where: str, hint: str = "") -> None:
        """See VisionTower; the position embedding is resampled to the network's image size if necessary."""
        grid = network.patch_embed.grid_size[0]
        # prefix tokens that have a position embedding
        num_prefix = network.pos_embed.shape[1] - grid**2
        found = resize_pos_embed(weights.read_tensors(path, where), grid, num_prefix)
        excess = (
            *weights.last_block_excess(self.depth - 1),
            (r"attn_pool\..+", "pooling behind the last block"),
        )
        found = weights.match(found, network.state_dict(), where, path, excess, hint=hint)
        weights.check_finite(found, where, path)
        weights.assign(network, found)
