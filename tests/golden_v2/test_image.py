"""Pixels of an image, resized whole, equal those of the newest release bit for bit (set g; images of the 2023 set)."""

import hashlib

import numpy as np
import pytest

from minigpt4.processors import Blip2ImageEvalProcessor, load_rgb
from tests.golden import GOLDEN as GOLDEN_2023
from tests.golden_v2 import GOLDEN, needs, read

pytestmark = needs("g_image/meta.json", "g_image/tensors.npz")
CASES = read("g_image/meta.json", {"cases": []})["cases"]


def pixels_of(image, size):
    path = GOLDEN_2023 / "f_image/images" / image
    if not path.is_file():
        pytest.skip(f"the 2023 set of fixtures has no image {image}")
    return Blip2ImageEvalProcessor(size)(load_rgb(path)).numpy()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['image']}-{case['size']}")
def test_pixels(case):
    pixels = pixels_of(case["image"], case["size"])
    assert list(pixels.shape) == case["shape"]
    assert (
        hashlib.sha256(pixels.astype("<f4").tobytes()).hexdigest()
        == case["sha256_of_float32_bytes"]
    )


def test_stored_pixels():
    stored = np.load(GOLDEN / "g_image/tensors.npz")
    for key in stored.files:
        name, size, *every = key.split("__")
        image = next(case["image"] for case in CASES if case["image"].startswith(f"{name}."))
        pixels = pixels_of(image, int(size))
        if every:  # "every_37th" row and column
            step = int("".join(filter(str.isdigit, every[0])))
            pixels = pixels[:, ::step, ::step]
        assert np.array_equal(pixels, stored[key]), key
