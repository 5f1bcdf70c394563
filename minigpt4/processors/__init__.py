"""Processors: from an image to the tensor for the model, from a caption to the text to learn.

They are registered by name:
`registry.get_processor_class("blip2_image_train").from_config(section)`.
"""

from minigpt4.processors.base_processor import BaseProcessor
from minigpt4.processors.blip_processors import (
    Blip2ImageEvalProcessor,
    Blip2ImageTrainProcessor,
    BlipCaptionProcessor,
)
from minigpt4.processors.images import ImageError, load_image, load_rgb, to_rgb

__all__ = [
    "BaseProcessor",
    "Blip2ImageEvalProcessor",
    "Blip2ImageTrainProcessor",
    "BlipCaptionProcessor",
    "ImageError",
    "load_image",
    "load_rgb",
    "to_rgb",
]
