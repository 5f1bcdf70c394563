"""Decodes image files to RGB: for training, inspect, chat and evaluation.

Files are untrusted: a decoder may read only as many bytes, and run only as long, as any legitimate image needs.
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

# Only formats that are decoded in-process: Pillow would start Ghostscript for an EPS file named .jpg.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# 192 MiB as RGB; the largest phone images have about 50 million pixels
MAX_PIXELS = 64 * 1024 * 1024
MAX_BYTES = 256 * 1024 * 1024  # of a file
MAX_SECONDS = 10  # of CPU time; 64 million pixels take 2 to 4
MAX_SCANS = 100  # of a JPEG; encoders write 1 to 12, and each covers all pixels
MAX_SCANNED_PIXELS = 1 << 31  # scans x pixels: about 4 s
MAX_EXIF = 1 << 16  # bytes; the EXIF segment of a JPEG cannot be larger
_ORIENTATION = 0x0112  # EXIF tag; for its values 2 to 8, what turns an image upright:
_TURNS = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90"
_TO_UPRIGHT = {value: Image.Transpose[turn] for value, turn in enumerate(_TURNS.split(), 2)}
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of a JPEG; none in entropy-coded data


class ImageError(ValueError):
    """An image that cannot be decoded, or that exceeds a limit."""


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a PIL image of any mode as RGB.

    Alpha is dropped, not blended, 16-bit values are clipped, and the EXIF orientation is
    ignored. Source: MiniGPT-4 2023 (`image.convert("RGB")`).
    """
    return image if image.mode == "RGB" else image.convert("RGB")


def as_shown(image: Image.Image) -> Image.Image:
    """Return a PIL image of any mode as RGB, as a viewer shows it: upright, on a white background, in 8 bits.

    More than 8 bits are scaled, see `_eight_bits`. Of an animation the first frame is used.
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
            _check_scans(image, data)
            image.load()
            return convert(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:  # its message contains the repr of the file object
        raise ImageError(
            f"UnidentifiedImageError: cannot identify image file as {', '.join(FORMATS)}"
        ) from error
    except Exception as error:  # a broken file makes Pillow's decoders raise almost anything
        raise ImageError(f"{type(error).__name__}: {error}") from error


def load_rgb(
    source: str | os.PathLike | bytes | BinaryIO, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Return the image in `source` converted as in the datasets of 2023 (`to_rgb`); otherwise as `load_image`."""
    return load_image(source, max_pixels, to_rgb)


def check_size(image: Image.Image, max_pixels: int) -> None:
    """Raise ImageError if an image has more than `max_pixels` pixels according to its header."""
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"{width} x {height} pixels; at most {max_pixels:,} are accepted")


def _content(source: str | os.PathLike | BinaryIO) -> bytes:
    if not hasattr(source, "read"):
        if not stat.S_ISREG(os.stat(source).st_mode) and not os.path.isdir(source):
            raise ImageError("no regular file")  # opening a FIFO would block
        with open(source, "rb") as file:
            return _content(file)
    data = source.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ImageError(f"more than {MAX_BYTES >> 20} MiB")
    return data


class _Bounded(io.BytesIO):
    """A file in memory that raises ImageError if a decoder reads it too many times, or takes too long."""

    def __init__(self, data: bytes):
        super().__init__(data)
        self._bytes_left = 8 * len(data) + (1 << 24)
        self._deadline = time.thread_time() + MAX_SECONDS

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self._bytes_left -= len(data)
        if self._bytes_left < 0 or time.thread_time() > self._deadline:
            raise ImageError(f"no end after {MAX_SECONDS} s or {len(self.getbuffer()) * 8:,} bytes")
        return data


def _check_scans(image: Image.Image, data: bytes) -> None:
    """Raise ImageError if an image is a JPEG with too many scans for its size."""
    most = min(MAX_SCANS, MAX_SCANNED_PIXELS // (image.width * image.height))
    # counting the bytes is fast, and never finds fewer scans than there are
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > most:
        num_scans = _num_scans(data)
        if num_scans > most:
            raise ImageError(f"{num_scans:,} scans; at most {most} are accepted at this size")


def _num_scans(data: bytes) -> int:
    """Return the number of scans of a JPEG up to its end marker; phones append videos after that."""
    num_scans, position = 0, 2
    while (match := _MARKER.search(data, position)) and match[0] != b"\xff\xd9":
        num_scans += match[0] == b"\xff\xda"
        # a marker is followed by the length of its segment
        position = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
    return num_scans


def _upright(image: Image.Image) -> Image.Image:
    """Return an image rotated or mirrored according to its EXIF orientation, as viewers do, if that can be read."""
    if len(image.info.get("exif", b"")) > MAX_EXIF:
        return image
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # malformed EXIF makes Pillow raise almost anything, but the pixels are fine
        return image
    return image.transpose(_TO_UPRIGHT[orientation]) if orientation in _TO_UPRIGHT else image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return an image of integers or floats as 8-bit grey.

    Black and white are the ends of the range for which the values are meant: 0..1 (floats), 0..255, or 16 bits; for
    values that use less than a quarter of 16 bits (10 to 14 bits of cameras) or exceed them, the minimum and maximum.
    """
    values = np.asarray(image, dtype=np.float32)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    black, white = low, max(high, low + 1e-6)
    if low >= 0 and high <= 255:
        black, white = 0.0, 1.0 if image.mode == "F" and high <= 1 else 255.0
    elif low >= 0 and 1 << 14 <= high < 1 << 16:
        black, white = 0.0, 65535.0
    levels = (values - black) * (255 / (white - black))
    levels = np.nan_to_num(levels, posinf=255, neginf=0).clip(0, 255)
    levels[values == image.info.get("transparency", -1)] = 255  # the grey that means transparent
    return Image.fromarray(levels.round().astype(np.uint8))
