"""The one way from a file or its bytes to RGB pixels, and the base class of processors."""

import dataclasses
import io
import os
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from PIL import Image, UnidentifiedImageError

# Pillow would start Ghostscript for an EPS file that calls itself .jpg; these formats are decoded in-process.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64 * 1024 * 1024  # 192 MiB as RGB; the largest phone images have about 50 million pixels


class ImageError(ValueError):
    """An image that cannot be decoded, or that is larger than its limit."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a PIL image as RGB, whatever its mode.

    Alpha is dropped, not blended, 16-bit values are clipped, and the EXIF orientation is left
    alone. Source: MiniGPT-4 2023 (`image.convert("RGB")`).
    """
    return image if image.mode == "RGB" else image.convert("RGB")


def load_rgb(source: str | os.PathLike | bytes | BinaryIO, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the image in `source` (a path, bytes or a binary file) as a PIL image of mode RGB.

    The size is read from the header and checked before anything is decoded. Raises ImageError if
    the image is too large or broken; a path that cannot be opened raises OSError.
    """
    if isinstance(source, (str, bytes)) or hasattr(source, "__fspath__"):
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            return load_rgb(file, max_pixels)
    try:
        with Image.open(source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(f"{width} x {height} pixels; at most {max_pixels:,} are accepted")
            image.load()
            return to_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:  # it names an object in memory
        raise ImageError(f"UnidentifiedImageError: cannot identify image file as {', '.join(FORMATS)}") from error
    except Exception as error:  # a broken file makes Pillow's decoders raise almost anything
        raise ImageError(f"{type(error).__name__}: {error}") from error


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
