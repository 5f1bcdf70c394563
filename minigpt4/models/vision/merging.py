"""The bridges without a Q-Former: the vectors of neighbouring patches joined, or the patches as they are.

Source of the merging: MiniGPT-4's newest release.
"""

import torch

from minigpt4.models.vision.tower import VisionTower

NUM_MERGED = 4  # patches to a vector, neighbours in a row: a strip, no square
GROUPS = {"merged": NUM_MERGED, "none": 1}  # {bridge: patches to a vector}


def bridge_shape(tower: VisionTower, image_size: int, bridge: str) -> tuple[int, int]:
    """Return (vectors of an image, their width). Raises ValueError if its patches do not come out even."""
    patches = tower.num_tokens(image_size) - tower.num_prefix  # prefix tokens are dropped
    size = GROUPS[bridge]
    if patches % size:
        raise ValueError(
            f"model.image_size: {image_size} gives {patches} patches, which do not come out even in groups of "
            f"{size}; without a Q-Former take another size, such as 224 or 448"
        )
    return patches // size, size * tower.width


def join_patches(tokens: torch.Tensor, num_prefix: int, bridge: str) -> torch.Tensor:
    """Return [B, N / g, g * D] of tokens [B, prefix + N, D], groups of g patches; they may cross the ends of rows."""
    return tokens[:, num_prefix:].unflatten(1, (-1, GROUPS[bridge])).flatten(2)
