"""The one loader of images: modes, limits, formats."""

import io

import numpy as np
import pytest
from PIL import Image

from minigpt4.processors import ImageError, load_rgb, to_rgb


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    image = Image.new(mode, (5, 4), 1)
    kind = "TIFF" if mode == "CMYK" else "PNG"
    result = load_rgb(encoded(image, kind))
    assert (result.mode, result.size) == ("RGB", (5, 4))
    path = tmp_path / "image"
    path.write_bytes(encoded(image, kind))
    assert np.array_equal(np.asarray(load_rgb(path)), np.asarray(result))
    with open(path, "rb") as file:
        assert np.array_equal(np.asarray(load_rgb(file)), np.asarray(result))


def test_alpha_is_dropped_not_blended():
    transparent = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert load_rgb(encoded(transparent)).getpixel((0, 0)) == (10, 20, 30)
    opaque = Image.new("RGB", (2, 2))
    assert to_rgb(opaque) is opaque


def test_the_orientation_tag_is_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert load_rgb(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).size == (8, 4)


def test_size_is_judged_by_the_header_before_anything_is_decoded():
    content = encoded(Image.new("RGB", (30, 20)))
    assert load_rgb(content, max_pixels=600).size == (30, 20)
    with pytest.raises(ImageError, match="30 x 20 pixels; at most 599 are accepted"):
        load_rgb(content[:60], max_pixels=599)  # cut behind the header: decoding would say "truncated"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        encoded(Image.new("RGB", (99, 99)), "JPEG")[:300],
    ],
    ids=["empty", "text", "cut"],
)
def test_what_is_no_image_is_an_image_error(content):
    with pytest.raises(ImageError):
        load_rgb(content)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_rgb(tmp_path / "none.jpg")


def test_formats_that_start_other_programs_are_not_even_recognised():
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    with Image.open(io.BytesIO(content)) as image:  # Pillow itself would hand it to Ghostscript
        assert image.format == "EPS"
    with pytest.raises(ImageError, match="cannot identify image file"):
        load_rgb(content)
