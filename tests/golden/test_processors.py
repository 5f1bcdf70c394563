"""Pixels and captions equal those of the 2023 release bit for bit (fixture sets f and g)."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from minigpt4.common.registry import registry
from minigpt4.processors import load_rgb
from tests.golden import GOLDEN

FOLDER = GOLDEN / "f_image"
META = json.loads((FOLDER / "meta.json").read_text(encoding="utf-8"))
CAPTIONS = json.loads((GOLDEN / "g_text" / "blip_caption.json").read_text(encoding="utf-8"))


def picture(name):
    file = next(entry["file"] for entry in META["images"] if entry["name"] == name)
    return load_rgb(FOLDER / file)


def processor(kind, **settings):
    return registry.get_processor_class(kind).from_config(settings)


def test_eval_pixels_are_bit_identical():
    expected = np.load(FOLDER / "eval.npz")
    for key in expected.files:
        name, size = key.split("__")
        result = processor("blip2_image_eval", image_size=int(size))(picture(name))
        assert result.dtype == torch.float32
        assert np.array_equal(result.numpy(), expected[key]), key
    assert len(expected.files) >= len(META["images"])


@pytest.mark.parametrize("case", META["train"], ids=lambda case: case["key"])
def test_train_pixels_are_bit_identical(case):
    train = processor(
        "blip2_image_train",
        image_size=case["image_size"],
        min_scale=case["min_scale"],
        max_scale=case["max_scale"],
    )
    torch.manual_seed(case["torch_seed"])
    result = train(picture(case["image"]))
    if case["output_stored"]:
        assert np.array_equal(result.numpy(), np.load(FOLDER / "train.npz")[case["key"]])
    else:  # the sum runs over equal numbers in float64; only the order of adding may differ
        assert float(result.double().sum()) == pytest.approx(case["output_sum"], abs=1e-6)
    torch.manual_seed(case["torch_seed"])
    crop = train.transform.transforms[0]
    box = crop.get_params(picture(case["image"]), crop.scale, crop.ratio)
    assert box == tuple(case[f"crop_{side}"] for side in ("top", "left", "height", "width"))


@pytest.mark.parametrize(("width", "height"), [(90, 400), (400, 90), (30, 40), (500, 370)])
def test_columns_are_resized_before_rows(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = Image.fromarray(pixels).resize((56, height), Image.Resampling.BICUBIC)
    expected = np.asarray(
        expected.resize((56, 56), Image.Resampling.BICUBIC), np.float32
    ) / np.float32(255)
    mean, std = (np.array(META[key], np.float32) for key in ("mean", "std"))
    result = processor("blip2_image_eval", image_size=56)(Image.fromarray(pixels))
    assert np.array_equal(result.permute(1, 2, 0).numpy(), (expected - mean) / std)


def test_crop_sequences_follow_torchs_generator():
    for sequence in META["crop_sequences"]:
        low, high = sequence["scale"]
        crop = processor("blip2_image_train", min_scale=low, max_scale=high).transform.transforms[0]
        width, height = sequence["size_wh"]
        image = torch.empty(3, height, width)
        torch.manual_seed(sequence["torch_seed"])
        expected = sequence["params_top_left_height_width"]
        assert [list(crop.get_params(image, crop.scale, crop.ratio)) for _ in expected] == expected


def test_captions_are_equal():
    default = processor("blip_caption", **CAPTIONS["defaults"])
    for row in CAPTIONS["rows"]:
        assert default(row["input"]) == row["output"], row["input"]
    for variant in CAPTIONS["variants"]:
        clean = processor("blip_caption", **variant["config"])
        for row in variant["rows"]:
            assert clean(row["input"]) == row["output"], (variant["config"], row["input"])
