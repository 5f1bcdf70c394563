"""The image size and normalisation that a vision tower expects."""

from typing import NamedTuple

# Source: CLIP's mean and standard deviation of RGB, which EVA-CLIP and BLIP-2 also use.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ImageFormat(NamedTuple):
    """Square images of `size` x `size` pixels; `mean` and `std` normalise R, G and B values in 0..1."""

    size: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
