"""The bridges without a Q-Former: neighbouring patches joined into one vector, or single patches.

Source of the merging: MiniGPT-4's newest release.
"""

import torch

from minigpt4.models.vision.tower import VisionTower

NUM_MERGED = 4  # patches per vector: consecutive ones, so a strip, not a square
GROUPS = {"merged": NUM_MERGED, "none": 1}  # {bridge: patches per vector}


def bridge_shape(tower: VisionTower, image_size: int, bridge: str) -> tuple[int, int]:
    """Return (vectors per image, their width). Raises ValueError if the patches cannot be divided into groups."""
    patches = tower.num_tokens(image_size) - tower.num_prefix  # prefix tokens are dropped
    size = GROUPS[bridge]
    if patches % size:
        raise ValueError(
            f"model.image_size: {image_size} gives {patches} patches, which do not come out even in groups of "
            f"{size}; without a Q-Former take another size, such as 224 or 448"
        )
    return patches // size, size * tower.width


def join_patches(tokens: torch.Tensor, num_prefix: int, bridge: str) -> torch.Tensor:
    """Return vectors [B, N / g, g * D] of tokens [B, prefix + N, D], joining g patches; a group may span two rows."""
    return tokens[:, num_prefix:].unflatten(1, (-1, GROUPS[bridge])).flatten(2)
