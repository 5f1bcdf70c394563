"""The base class of processors."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image


class BaseProcessor:
    """Returns its input unchanged; the base of the registered processors."""

    @dataclasses.dataclass
    class Config:
        pass

    @classmethod
    def from_config(cls, cfg: Mapping | None = None) -> "BaseProcessor":
        """Return a processor built from a section or a dict; absent keys take the class's defaults."""
        cfg = cfg or {}
        given = {field.name: cfg.get(field.name) for field in dataclasses.fields(cls.Config)}
        return cls(**{name: value for name, value in given.items() if value is not None})

    def __call__(self, item: Any) -> Any:
        return item

    def to_image(self, pixels: torch.Tensor) -> Image.Image:
        """Return the image that a tensor of this processor shows: float [3, S, S], here of values in 0..1."""
        levels = (pixels * 255).round().clamp(0, 255).byte()
        return Image.fromarray(levels.permute(1, 2, 0).numpy())
