"""From whatever a person uploads to an upright RGB image, by training's reader, and to the pixels of a processor."""

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
    """Return a path's, PIL or numpy image (uint8 [H, W] or [H, W, C]) as upright RGB.

    Raises FileNotFoundError or ImageError.
    """
    if isinstance(source, np.ndarray):
        with suppress(TypeError, ValueError):  # of another type or shape: refused below
            source = Image.fromarray(source)
    if isinstance(source, Image.Image):
        check_size(source, max_pixels)
        try:
            return as_shown(source)
        except Exception as error:  # what is decoded only now makes Pillow raise almost anything
            raise ImageError(f"{type(error).__name__}: {error}") from error
    if not isinstance(source, (str, Path)):
        raise ImageError(
            f"image: {type(source).__name__}; expected a path, a PIL or numpy image or a tensor of pixels"
        )
    if not Path(source).is_file():
        raise FileNotFoundError(f"image: no file '{source}'")
    try:
        return load_image(source, max_pixels)
    except (OSError, ValueError) as error:
        raise ImageError(
            f"image '{source}': {error}; expected an image ({', '.join(FORMATS)})"
        ) from error


def fitted_processor(vis_processor: Callable, model: nn.Module) -> Callable:
    """Return an image processor of the model's size, mean and std, for a plain section may not name them.

    Evaluation kits read such sections. A mean or std that is named stays.
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
    """Return the pixels [3, S, S] of an image; those of a processor, also as [1, 3, S, S], are taken as they are.

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
