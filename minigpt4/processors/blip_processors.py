"""The BLIP-2 processors of MiniGPT-4's training and chat; bit-identical to the 2023 release.

torchvision's v1 transforms are used on purpose: `transforms.v2` multiplies by 1/255 and 1/std,
which rounds differently in the last bit, and is 8 % slower on PIL input.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from minigpt4.common.image_format import CLIP_MEAN, CLIP_STD
from minigpt4.common.registry import registry
from minigpt4.processors.base_processor import BaseProcessor
from minigpt4.processors.images import to_rgb


def resize_square(image: Image.Image, size: int) -> Image.Image:
    """Return a PIL image resized to size x size, bicubic with antialiasing: columns first, then rows.

    The order is fixed because Pillow 13 resizes the rows of tall images first, which changes
    pixels of noise by up to 14 of 255 levels; two calls give the pixels of 2023 with every version.
    """
    columns = image.resize((size, image.height), Image.Resampling.BICUBIC)
    return columns.resize((size, size), Image.Resampling.BICUBIC)


class RandomCropResize(transforms.RandomResizedCrop):
    """Crops a random part of the image, aspect 3/4..4/3, and resizes it to a square; draws from torch's global RNG."""

    def forward(self, image: Image.Image) -> Image.Image:
        crop = functional.crop(image, *self.get_params(image, self.scale, self.ratio))
        return resize_square(crop, self.size[0])


class BlipImageProcessor(BaseProcessor):
    """Returns float32 [3, image_size, image_size]: the image after `geometry`, as (pixels / 255 - mean) / std."""

    @dataclass
    class Config:
        image_size: int = 224  # pixels
        mean: list[float] | None = None  # of R, G, B in 0..1; by default CLIP's
        std: list[float] | None = None

    def __init__(
        self, geometry: Callable, image_size: int, mean: Sequence | None, std: Sequence | None
    ):
        if image_size < 1:
            raise ValueError(f"image_size: {image_size}; expected at least 1 pixel")
        self.named = {"mean": mean, "std": std}  # as given; None where the default is used
        mean, std = list(mean or CLIP_MEAN), list(std or CLIP_STD)
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"mean {mean}, std {std}: expected three numbers each (R, G, B), std above 0"
            )
        self.image_size = image_size
        self.mean, self.std = mean, std
        # `pixels.halves` splits this chain
        self.transform = transforms.Compose(
            [geometry, transforms.ToTensor(), transforms.Normalize(mean, std)]
        )

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.transform(to_rgb(image))

    def to_image(self, pixels: torch.Tensor) -> Image.Image:
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return super().to_image(pixels * std + mean)


@registry.register_processor("blip2_image_train")
class Blip2ImageTrainProcessor(BlipImageProcessor):
    """Random crop of `min_scale`..`max_scale` of the area, see RandomCropResize; bicubic."""

    @dataclass
    class Config(BlipImageProcessor.Config):
        min_scale: float = 0.5  # of the image's area
        max_scale: float = 1.0

    def __init__(
        self,
        image_size: int = 224,
        mean: Sequence | None = None,
        std: Sequence | None = None,
        min_scale: float = 0.5,
        max_scale: float = 1.0,
    ):
        if not 0 < min_scale <= max_scale:
            raise ValueError(
                f"min_scale {min_scale}, max_scale {max_scale}: expected 0 < min_scale <= max_scale"
            )
        super().__init__(
            RandomCropResize(image_size, scale=(min_scale, max_scale)), image_size, mean, std
        )


@registry.register_processor("blip2_image_eval")
class Blip2ImageEvalProcessor(BlipImageProcessor):
    """Bicubic resize to a square; the aspect ratio is not kept."""

    def __init__(
        self, image_size: int = 224, mean: Sequence | None = None, std: Sequence | None = None
    ):
        super().__init__(partial(resize_square, size=image_size), image_size, mean, std)


@registry.register_processor("blip_caption")
class BlipCaptionProcessor(BaseProcessor):
    """Returns `prompt` followed by the caption, in lower case, without most punctuation, cut to `max_words` words."""

    @dataclass
    class Config:
        prompt: str = ""
        max_words: int = 50

    def __init__(self, prompt: str = "", max_words: int = 50):
        if max_words < 1:
            raise ValueError(f"max_words: {max_words}; expected at least 1")
        self.prompt, self.max_words = prompt, max_words

    def __call__(self, caption: str) -> str:
        text = re.sub(r'[.!"()*#:;~]', " ", caption.lower())
        text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
        return self.prompt + " ".join(text.split(" ")[: self.max_words])
