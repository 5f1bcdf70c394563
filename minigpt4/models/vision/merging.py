"""The bridge without a Q-Former: vectors of neighbouring patches are joined. Source: MiniGPT-4's newest release."""

import torch

from minigpt4.models.vision.tower import VisionTower

NUM_MERGED = 4  # patches to a vector, neighbours in a row: a strip, no square


def num_merged(tower: VisionTower, image_size: int) -> int:
    """Return the number of vectors of an image. Raises ValueError if its patches do not come out even."""
    patches = tower.num_tokens(image_size) - 1  # the class token is dropped
    if patches % NUM_MERGED:
        raise ValueError(
            f"model.image_size: {image_size} gives {patches} patches, which do not come out even in groups of "
            f"{NUM_MERGED}; without a Q-Former take another size, such as 224 or 448"
        )
    return patches // NUM_MERGED


def merge_patches(tokens: torch.Tensor) -> torch.Tensor:
    """Return [B, N / 4, 4 * D] of tokens [B, 1 + N, D], the class token first; groups may cross the ends of rows."""
    return tokens[:, 1:].unflatten(1, (-1, NUM_MERGED)).flatten(2)
