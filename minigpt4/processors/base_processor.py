"""The base class of processors."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image


class BaseProcessor:
    """The base of the registered processors; by itself it returns its input unchanged."""

    @dataclasses.dataclass
    class Config:
        pass

    @classmethod
    def from_config(cls, cfg: Mapping | None = None) -> "BaseProcessor":
        """Return a processor built from a section or dict; keys that are absent or None keep the class's defaults."""
        cfg = cfg or {}
        values = {field.name: cfg.get(field.name) for field in dataclasses.fields(cls.Config)}
        return cls(**{name: value for name, value in values.items() if value is not None})

    def __call__(self, item: Any) -> Any:
        return item

    def to_image(self, pixels: torch.Tensor) -> Image.Image:
        """Return a tensor of this processor as an image; `pixels`: float [3, S, S], in this class of values in 0..1."""
        levels = (pixels * 255).round().clamp(0, 255).byte()
        return Image.fromarray(levels.permute(1, 2, 0).numpy())
