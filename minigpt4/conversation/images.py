"""Reads an uploaded image as upright RGB, as training does, and prepares its pixels for the vision encoder."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor, nn

from minigpt4.common.image_format import ImageFormat
from minigpt4.common.logger import warn_once
from minigpt4.processors.blip_processors import BlipImageProcessor
from minigpt4.processors.images import (
    FORMATS,
    MAX_PIXELS,
    ImageError,
    as_shown,
    check_size,
    load_image,
)


def open_image(
    source: str | Path | Image.Image | np.ndarray, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Return the image of a path, PIL image or numpy array (uint8 [H, W] or [H, W, C]) as upright RGB.

    Raises FileNotFoundError, or ImageError for anything that is no image or is too large.
    """
    if isinstance(source, np.ndarray):
        with suppress(TypeError, ValueError):  # of another dtype or shape: refused below
            source = Image.fromarray(source)
    if isinstance(source, Image.Image):
        check_size(source, max_pixels)
        try:
            return as_shown(source)
        except Exception as error:  # Pillow decodes only now, and may raise almost anything
            raise ImageError(f"{type(error).__name__}: {error}") from error
    if not isinstance(source, (str, Path)):
        raise ImageError(
            f"image: {type(source).__name__}; expected a path, a PIL or numpy image or a tensor of pixels"
        )
    if Path(source).is_dir():
        raise ImageError(f"image '{source}': a folder; expected an image ({', '.join(FORMATS)})")
    if not Path(source).is_file():
        raise FileNotFoundError(f"image: no file '{source}'")
    try:
        return load_image(source, max_pixels)
    except (OSError, ValueError) as error:
        raise ImageError(
            f"image '{source}': {error}; expected an image ({', '.join(FORMATS)})"
        ) from error


def fitted_processor(vis_processor: Callable, model: nn.Module) -> Callable:
    """Return the image processor with the model's image size, mean and std; warn of each that changes.

    Configuration sections may leave them out, as those that evaluation kits read do. A mean or std that is given stays.
    """
    size = getattr(model, "image_size", None)
    if not isinstance(vis_processor, BlipImageProcessor) or size is None:
        return vis_processor
    own = getattr(model, "pixels", ImageFormat(size, vis_processor.mean, vis_processor.std))
    mean, std = (vis_processor.named[name] or getattr(own, name) for name in ("mean", "std"))
    fitted = type(vis_processor)(size, mean, std)
    changes = []
    for name in ("image_size", "mean", "std"):
        found, taken = getattr(vis_processor, name), getattr(fitted, name)
        if found != taken:
            changes.append(
                f"{name}: {found} in the image processor, the model takes {taken}: taken"
            )
    for change in changes:
        warn_once(model, change)
    return fitted if changes else vis_processor


def pixels_of(
    image: str | Path | Image.Image | np.ndarray | Tensor, vis_processor: Callable
) -> Tensor:
    """Return the pixels [3, S, S] of an image; a tensor, [3, S, S] or [1, 3, S, S], is taken as already processed.

    Raises FileNotFoundError, ImageError or ValueError.
    """
    if not isinstance(image, Tensor):
        return vis_processor(open_image(image))
    pixels = image[0] if image.ndim == 4 and len(image) == 1 else image
    if pixels.ndim != 3 or len(pixels) != 3 or not pixels.is_floating_point():
        raise ValueError(
            f"image: tensor {tuple(image.shape)} of {image.dtype}; expected float [3, S, S]"
        )
    return pixels
