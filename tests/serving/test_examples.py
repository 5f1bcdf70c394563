"""The example images of the page are what the quickstart draws, none of which it trains on."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minigpt4.quickstart import world
from minigpt4.serving.page_parts import EXAMPLES

NUMBERS = {"night_sky": 6, "grass": 17, "brick_wall": 26}


@pytest.mark.parametrize("path", EXAMPLES)
def test_an_example_is_a_held_out_image(path):
    drawn = world.draw("held_out", NUMBERS[Path(path).stem])[1]
    assert np.array_equal(np.asarray(Image.open(path)), drawn)
    assert Path(path).stat().st_size < 20_000 and EXAMPLES[path]
