"""From whatever a person uploads to an upright RGB image."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from minigpt4.processors.base_processor import FORMATS, MAX_PIXELS, ImageError


def upright_rgb(image: Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return a PIL image of any mode as RGB, as a viewer shows it.

    The EXIF orientation is applied, transparent parts become white, 16-bit values are scaled to 8
    bits. (Training keeps 2023's plain `convert("RGB")`: no effect on opaque 8-bit images without
    EXIF.) Raises ImageError if the image is too large or broken.
    """
    # known from the header, nothing is decoded yet
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} pixels; at most {max_pixels:,} are accepted")
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # 16 or 32 bits
            values = np.asarray(image, dtype=np.float32)
            scale = 257 if values.max(initial=0) > 255 else 1
            image = Image.fromarray((values / scale).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # a broken file makes Pillow's decoders raise almost anything
        raise ImageError(f"{type(error).__name__}: {error}") from error


def open_image(source: str | Path | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return a path's or PIL image as upright RGB; raises FileNotFoundError or ImageError."""
    if isinstance(source, Image.Image):
        return upright_rgb(source, max_pixels)
    if not isinstance(source, (str, Path)):
        raise ImageError(f"image: {type(source).__name__}; expected a path, a PIL image or a tensor of pixels")
    if not Path(source).is_file():
        raise FileNotFoundError(f"image: no file '{source}'")
    try:
        with Image.open(source, formats=FORMATS) as image:
            return upright_rgb(image, max_pixels)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"image '{source}': {error}; expected an image ({', '.join(FORMATS)})") from error
