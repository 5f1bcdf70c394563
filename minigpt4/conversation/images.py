"""From whatever a person uploads to an upright RGB image: by training's reader."""

from pathlib import Path

from PIL import Image

from minigpt4.processors.images import FORMATS, MAX_PIXELS, ImageError, as_shown, check_size, load_image


def open_image(source: str | Path | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return a path's or PIL image as upright RGB; raises FileNotFoundError or ImageError."""
    if isinstance(source, Image.Image):
        check_size(source, max_pixels)
        try:
            return as_shown(source)
        except Exception as error:  # what is decoded only now makes Pillow raise almost anything
            raise ImageError(f"{type(error).__name__}: {error}") from error
    if not isinstance(source, (str, Path)):
        raise ImageError(f"image: {type(source).__name__}; expected a path, a PIL image or a tensor of pixels")
    if not Path(source).is_file():
        raise FileNotFoundError(f"image: no file '{source}'")
    try:
        return load_image(source, max_pixels)
    except (OSError, ValueError) as error:
        raise ImageError(f"image '{source}': {error}; expected an image ({', '.join(FORMATS)})") from error
