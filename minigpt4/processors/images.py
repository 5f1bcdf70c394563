"""The one way from an image file, or its bytes, to RGB pixels: for training, inspect, chat and evaluation.

Files come from strangers: a decoder is given bytes only as often, and time only as long, as any honest image needs.
"""

import io
import os
import re
import stat
import time
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from minigpt4.common.utils import LFS_POINTER

# Pillow would start Ghostscript for an EPS file that calls itself .jpg; these formats are decoded in-process.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# 192 MiB as RGB; the largest phone images have about 50 million pixels
MAX_PIXELS = 64 * 1024 * 1024
MAX_BYTES = 256 * 1024 * 1024  # of a file
MAX_SECONDS = 10  # of CPU time; 64 million pixels take 2 to 4
MAX_SCANS = 100  # of a JPEG; encoders write 1 to 12, and each goes over all pixels
MAX_SCANNED_PIXELS = 1 << 31  # scans x pixels: about 4 s
MAX_EXIF = 1 << 16  # bytes; a JPEG has no room for more
_ORIENTATION = 0x0112  # EXIF's tag; its values and what turns the image upright:
_UPRIGHT = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), start=2))
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of a JPEG; none in entropy-coded data


class ImageError(ValueError):
    """An image that cannot be decoded, or that is larger than its limit."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a PIL image as RGB, whatever its mode.

    Alpha is dropped, not blended, 16-bit values are clipped, and the EXIF orientation is left
    alone. Source: MiniGPT-4 2023 (`image.convert("RGB")`).
    """
    return image if image.mode == "RGB" else image.convert("RGB")


def as_shown(image: Image.Image) -> Image.Image:
    """Return a PIL image of any mode as RGB, as a viewer shows it: upright, on white, in 8 bits.

    More than 8 bits are scaled: see `_eight_bits`. Animations give their first image.
    """
    image = _upright(image)
    if image.mode[0] in "IF":
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return to_rgb(image)


def load_image(
    source: str | os.PathLike | bytes | BinaryIO,
    max_pixels: int = MAX_PIXELS,
    convert: Callable[[Image.Image], Image.Image] = as_shown,
) -> Image.Image:
    """Return the image in `source` (a path, bytes or a binary file) as a PIL image of mode RGB.

    The size is read from the header and checked before anything is decoded. Raises ImageError if
    the image is too large or broken; a path that cannot be opened raises OSError.
    """
    data = source if isinstance(source, bytes) else _content(source)
    if data.startswith(LFS_POINTER.encode()):
        raise ImageError("a Git LFS pointer, not the image: install git-lfs and run `git lfs pull`")
    try:
        with Image.open(_Bounded(data), formats=FORMATS) as image:
            check_size(image, max_pixels)
            most = min(MAX_SCANS, MAX_SCANNED_PIXELS // (image.width * image.height))
            if (
                image.format in ("JPEG", "MPO")
                and data.count(b"\xff\xda") > most
                and _num_scans(data) > most
            ):
                raise ImageError(
                    f"{_num_scans(data):,} scans; at most {most} are accepted at this size"
                )
            image.load()
            return convert(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:  # it names an object in memory
        raise ImageError(
            f"UnidentifiedImageError: cannot identify image file as {', '.join(FORMATS)}"
        ) from error
    except Exception as error:  # a broken file makes Pillow's decoders raise almost anything
        raise ImageError(f"{type(error).__name__}: {error}") from error


def load_rgb(
    source: str | os.PathLike | bytes | BinaryIO, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Return the image in `source` as 2023's datasets have it (`to_rgb`); else as `load_image`."""
    return load_image(source, max_pixels, to_rgb)


def check_size(image: Image.Image, max_pixels: int) -> None:
    """Raise ImageError for an image of more than `max_pixels` pixels, by its header."""
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} pixels; at most {max_pixels:,} are accepted")


def _content(source: str | os.PathLike | BinaryIO) -> bytes:
    if not hasattr(source, "read"):
        if not stat.S_ISREG(os.stat(source).st_mode) and not os.path.isdir(source):
            raise ImageError("no regular file")  # a pipe would be waited for
        with open(source, "rb") as file:
            return _content(file)
    data = source.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImageError(f"more than {MAX_BYTES >> 20} MiB")
    return data


class _Bounded(io.BytesIO):
    """A file that ends with an ImageError for a decoder that reads it again and again, or for too long."""

    def __init__(self, data: bytes):
        super().__init__(data)
        self._room = 8 * len(data) + (1 << 24)
        self._end = time.thread_time() + MAX_SECONDS

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self._room -= len(data)
        if self._room < 0 or time.thread_time() > self._end:
            raise ImageError(f"no end after {MAX_SECONDS} s or {len(self.getbuffer()) * 8:,} bytes")
        return data


def _num_scans(data: bytes) -> int:
    """Return the number of scans of a JPEG up to its end marker, behind which phones append films."""
    scans, place = 0, 2
    while (match := _MARKER.search(data, place)) and match[0] != b"\xff\xd9":
        scans += match[0] == b"\xff\xda"
        place = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
    return scans


def _upright(image: Image.Image) -> Image.Image:
    """Return an image turned as its EXIF data say, where they can be read: a viewer goes by the same."""
    if len(image.info.get("exif", b"")) > MAX_EXIF:
        return image
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # malformed data make Pillow raise almost anything, and the image is sound
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return an image of integers or floats as grey in 8 bits.

    Black and white are the ends of what the numbers were meant to fill: 0..255, 0..1 of floats, or 16 bits; where they
    fill less than a quarter of 16 bits, as 10 to 14 bits of a camera do, or go beyond, the image's own range.
    """
    values = np.asarray(image, dtype=np.float32)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    black, white = low, max(high, low + 1e-6)
    if low >= 0 and high <= 255:
        black, white = 0.0, 1.0 if image.mode == "F" and high <= 1 else 255.0
    elif low >= 0 and 1 << 14 <= high < 1 << 16:
        black, white = 0.0, 65535.0
    levels = np.nan_to_num((values - black) * (255 / (white - black)), posinf=255, neginf=0).clip(
        0, 255
    )
    levels[values == image.info.get("transparency", -1)] = 255  # a grey that stands for nothing
    return Image.fromarray(levels.round().astype(np.uint8))
