"""A file gives the same pixels in training, validation, inspect, chat and evaluation, whatever its format."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from minigpt4.common.registry import registry
from minigpt4.conversation.images import open_image
from minigpt4.processors import load_rgb
from minigpt4.processors.blip_processors import Blip2ImageEvalProcessor
from tests.datasets.shards import write_tar
from tests.datasets.test_builders import section
from tests.processors.test_images import RAMP, encoded, grey

EXIF = Image.Exif()
EXIF[0x0112] = 6
FILES = {
    "png": encoded(grey(RAMP * 16)),
    "webp": encoded(Image.new("RGBA", (20, 10), (200, 0, 0, 90)), "WEBP", lossless=True),
    "jpg": encoded(grey(RAMP, np.uint8), "JPEG", exif=EXIF),
    "gif": encoded(Image.new("P", (20, 10)), "GIF", transparency=0),
    "tiff": encoded(grey(RAMP / 255, np.float32), "TIFF"),
    "bmp": encoded(Image.new("1", (20, 10), 1), "BMP"),
}
EVAL = {"train": {"name": "blip2_image_eval", "image_size": 16}}
PROCESS = Blip2ImageEvalProcessor(16)


def splits(builder, storage):
    cfg = section(builder, str(storage), vis_processor=EVAL, val={"storage": str(storage)})
    return registry.get_builder_class(builder)(cfg, "own").build_datasets()


def first(dataset):
    return next(dataset.one_pass())["image"]


@pytest.mark.parametrize("kind", FILES)
def test_own_data_is_as_the_chat_sees_it(tmp_path, kind):
    (tmp_path / f"a.{kind}").write_bytes(FILES[kind])
    (tmp_path / "a.txt").write_text("A dog.")
    (tmp_path / "own.jsonl").write_text(json.dumps({"image": f"a.{kind}", "caption": "A dog."}))
    write_tar(tmp_path / "0.tar", {"0": {kind: FILES[kind], "txt": b"A dog."}})
    expected = PROCESS(open_image(tmp_path / f"a.{kind}"))
    for builder, storage in {
        "image_text_jsonl": "own.jsonl",
        "webdataset": "0.tar",
        "image_text_folder": "",
    }.items():
        for dataset in splits(builder, tmp_path / storage).values():
            assert torch.equal(first(dataset), expected), (builder, dataset.name)


@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
def test_the_datasets_of_2023_are_plain_rgb(tmp_path, kind):
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / f"a.{kind}").write_bytes(FILES[kind])
    (tmp_path / "filter_cap.json").write_text(
        '{"annotations": [{"image_id": "a", "caption": "A dog."}]}'
    )
    write_tar(tmp_path / "0.tar", {"0": {kind: FILES[kind], "txt": b"A dog."}})
    expected = PROCESS(load_rgb(FILES[kind]))
    for builder, storage in {"laion": "0.tar", "cc_sbu": "0.tar", "cc_sbu_align": ""}.items():
        for dataset in splits(builder, tmp_path / storage).values():
            assert torch.equal(first(dataset), expected), (builder, dataset.name)
