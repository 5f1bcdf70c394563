"""The image loader: modes, limits, formats, malicious files."""

import io
import os
import struct
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minigpt4.processors import ImageError, images, load_image, load_rgb, to_rgb


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


def test_2023s_reader_drops_alpha_and_does_not_blend():
    transparent = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert load_rgb(encoded(transparent)).getpixel((0, 0)) == (10, 20, 30)
    opaque = Image.new("RGB", (2, 2))
    assert to_rgb(opaque) is opaque


def test_2023s_reader_leaves_the_orientation_alone():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    assert load_rgb(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).size == (8, 4)


def test_the_size_in_the_header_is_checked_before_decoding():
    content = encoded(Image.new("RGB", (30, 20)))
    assert load_rgb(content, max_pixels=600).size == (30, 20)
    with pytest.raises(ImageError, match="30 x 20 pixels; at most 599 are accepted"):
        # cut after the header: decoding would fail with "truncated"
        load_rgb(content[:60], max_pixels=599)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        encoded(Image.new("RGB", (99, 99)), "JPEG")[:300],
    ],
    ids=["empty", "text", "cut"],
)
def test_a_file_that_is_not_an_image_raises_image_error(content):
    with pytest.raises(ImageError):
        load_rgb(content)


def test_a_missing_file_raises_file_not_found_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_rgb(tmp_path / "none.jpg")


def test_formats_that_start_other_programs_are_not_even_recognised():
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    with Image.open(io.BytesIO(content)) as image:  # Pillow itself would hand it to Ghostscript
        assert image.format == "EPS"
    with pytest.raises(ImageError, match="cannot identify image file"):
        load_rgb(content)


# as a viewer shows it

RAMP = np.tile(np.linspace(0, 255, 64), (48, 1))


def grey(values, dtype=np.uint16):
    return Image.fromarray(values.astype(dtype))


def clear(mode, place):
    """Return a black image of one mode in which all but a square is transparent, saved by `place` options."""
    image = Image.new(mode, (64, 48), place.pop("fill", 0))
    image.paste(place.pop("ink"), (10, 10, 30, 30))
    return image, place


def cleared(colour):
    image = Image.new("RGB", (64, 48), "white")
    image.paste(colour, (10, 10, 30, 30))
    return np.asarray(image)


PALETTE = [255, 0, 0, 200, 0, 0]
SHOWN = {  # name: (image, format, options, pixels as a viewer has them)
    "16 bits": (grey(RAMP * 257), "PNG", {}, RAMP),
    "16 bits, dark": (grey(RAMP * 100), "PNG", {}, RAMP * 100 / 257),
    "10 bits in 16": (grey(RAMP * 4), "PNG", {}, RAMP),
    "12 bits in 16": (grey(RAMP * 16), "PNG", {}, RAMP),
    "12 bits in 16, TIFF": (grey(RAMP * 16), "TIFF", {}, RAMP),
    "14 bits in 16": (grey(RAMP * 64), "TIFF", {}, RAMP),
    "8 bits in 16": (grey(RAMP), "PNG", {}, RAMP),
    "32 bits": (grey(RAMP * 1e6, np.int32), "TIFF", {}, RAMP),
    "32 bits, below 0": (grey(RAMP * 4 - 500, np.int32), "TIFF", {}, RAMP),
    "floats of 0..1": (grey(RAMP / 255, np.float32), "TIFF", {}, RAMP),
    "floats of 0..255": (grey(RAMP, np.float32), "TIFF", {}, RAMP),
    "one value": (grey(RAMP * 0 + 300), "PNG", {}, RAMP * 0),
    "no number": (grey(RAMP * np.nan, np.float32), "TIFF", {}, RAMP * 0),
    "RGBA": (*clear("RGBA", {"ink": (200, 0, 0, 255)}), cleared((200, 0, 0))),
    "LA": (*clear("LA", {"ink": (0, 255)}), cleared((0, 0, 0))),
    "RGB with a colour": (*clear("RGB", {"ink": (200, 0, 0), "transparency": (0, 0, 0)}), cleared((200, 0, 0))),
    "L with a transparent grey": (*clear("L", {"ink": 9, "transparency": 0}), cleared((9, 9, 9))),
    "16 bits with a transparent grey": (*clear("I;16", {"ink": 65535, "transparency": 0}), cleared("white")),
    "palette with a transparent colour": (*clear("P", {"ink": 1, "transparency": 0}), cleared((200, 0, 0))),
    "GIF with a transparent colour": (*clear("P", {"ink": 1, "transparency": 0}), cleared((200, 0, 0))),
    "1 bit": (Image.fromarray(RAMP > 127), "PNG", {}, (RAMP > 127) * 255),
    "CMYK": (Image.new("CMYK", (64, 48), (0, 255, 255, 0)), "TIFF", {}, np.full((48, 64, 3), (255, 0, 0))),
}  # fmt: skip
SHOWN = {
    name: row if len(row) == 4 else (row[0], "GIF" if "GIF" in name else "PNG", *row[1:])
    for name, row in SHOWN.items()
}


@pytest.mark.parametrize("name", SHOWN)
def test_an_image_is_as_a_viewer_shows_it(name):
    image, kind, options, expected = SHOWN[name]
    if image.mode == "P":
        image.putpalette(PALETTE)
    found = np.asarray(load_image(encoded(image, kind, **options))).astype(float)
    expected = expected if expected.ndim == 3 else np.stack([expected] * 3, -1)
    assert found.shape == expected.shape and np.abs(found - expected).max() <= 1.01


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_photos_are_turned_upright(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (8, 4))
    image.paste("white", (0, 0, 8, 2))  # its upper half, which is the right one of the photo
    shown = np.asarray(load_image(encoded(image, kind, exif=exif)))
    assert shown.shape == (8, 4, 3) and shown[:, 3].min() > 200 and shown[:, 0].max() < 50


def test_an_image_with_a_broken_orientation_is_still_read():
    exif = b"Exif\0\0II*\0\xff\xff\xff\xff"
    assert load_image(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).size == (8, 4)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_several_frames_the_first_is_shown(kind):
    first, second = Image.new("RGB", (8, 4), "red"), Image.new("RGB", (8, 4), "blue")
    found = np.asarray(load_image(encoded(first, kind, save_all=True, append_images=[second])))
    assert found[..., 0].min() > 240 and found[..., 2].max() < 15


def test_a_git_lfs_pointer_and_a_fifo_are_named_in_the_error(tmp_path):
    with pytest.raises(ImageError, match="Git LFS pointer, not the image: install git-lfs"):
        load_image(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2690\n")
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="no regular file"):
        load_image(tmp_path / "a.jpg")
    with pytest.raises(IsADirectoryError):
        load_image(tmp_path)


# malicious files


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks):
    whole = encoded(Image.new("RGB", (9, 9)))
    return whole[:33] + b"".join(chunks) + whole[33:]


def overlapping_tags(size=3_000_000, count=5000):
    """Return TIFF data in which the value of each of `count` tags is the whole data."""
    tags = b"".join(struct.pack("<HHII", tag, 7, size, 8) for tag in range(1, count))
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", count - 1) + tags).ljust(size + 100, b"\0")


def scans(number, size):
    """Return a progressive JPEG whose last scan is repeated `number` times."""
    whole = encoded(Image.new("RGB", size), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * number + b"\xff\xd9"


ZEROS = zlib.compress(bytes(1_000_000), 9)
GIF = encoded(Image.new("P", (5, 5)), "GIF")
BOMBS = {
    "20,000 scans": lambda: scans(20_000, (1000, 1000)),
    "60 scans of many pixels": lambda: scans(60, (8000, 8000)),
    "color profiles": lambda: png_with(*[chunk(b"iCCP", b"a\0\0" + ZEROS)] * 3000),
    "texts": lambda: png_with(*[chunk(b"zTXt", b"a\0\0" + ZEROS)] * 3000),
    "overlapping tags": overlapping_tags,
    "a comment": lambda: (
        GIF[:-1].replace(b"\x2c", b"\x21\xfe" + (b"\xff" + bytes(255)) * 40_000 + b"\0\x2c", 1)
        + b";"
    ),
    "filling": lambda: b"\xff\xd8" + b"\xff" * 4_000_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_files_that_would_take_minutes_or_all_memory_are_rejected(name, monkeypatch):
    monkeypatch.setattr(images, "MAX_SECONDS", 0.3)
    content, start = BOMBS[name](), time.thread_time()
    with pytest.raises(ImageError, match=r"scans; at most|no end after|Too much memory"):
        load_image(content)
    assert time.thread_time() - start < 3


def test_harmless_oddities_are_read():
    assert load_image(png_with(chunk(b"eXIf", overlapping_tags()))).size == (9, 9)
    film = encoded(Image.new("RGB", (9, 9)), "JPEG") + b"\xff\xda" * 500  # a phone appends one
    assert load_image(film).size == (9, 9)


SOUND = [
    encoded(Image.new("RGB", (31, 17), "red"), kind)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
]
SOUND += [
    scans(2, (31, 17)),
    encoded(grey(RAMP), "TIFF", compression="tiff_lzw"),
    encoded(grey(RAMP / 9, np.float32), "TIFF"),
]
SOUND += [
    encoded(Image.new("P", (9, 9)), "GIF", save_all=True, append_images=[Image.new("P", (9, 9), 1)])
]


@settings(max_examples=400, deadline=None)
@given(
    content=st.sampled_from(SOUND),
    changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(max_size=8)), max_size=6),
    end=st.floats(0, 1),
)
@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it finds
def test_a_damaged_image_is_decoded_or_raises_image_error(content, changes, end):
    damaged = bytearray(content)
    for place, data in changes:
        place %= len(damaged)
        damaged[place : place + len(data)] = data
    if end < 0.2:
        damaged = damaged[: int(end * 5 * len(damaged))]
    start = time.thread_time()
    try:
        assert load_image(bytes(damaged), max_pixels=1 << 20).mode == "RGB"
    except ImageError as error:
        assert str(error)
    assert time.thread_time() - start < 5
