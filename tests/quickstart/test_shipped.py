"""The shipped checkpoint of the quickstart: it fits the vision weights of the package, and describes images."""

import json

import pytest
from PIL import Image

import minigpt4
from minigpt4.common.config_paths import PACKAGE_DIR
from minigpt4.models.fingerprints import content_fingerprint
from minigpt4.quickstart import world
from minigpt4.quickstart.prepare import cache_folder

FOLDER = PACKAGE_DIR / "quickstart/checkpoint"
LLM = cache_folder() / "llm"
needs_llm = pytest.mark.skipif(
    not LLM.is_dir(), reason="no LLM yet: python -m minigpt4.quickstart.prepare"
)


def test_it_is_small_and_names_no_folder_of_the_machine_that_made_it():
    files = list(FOLDER.iterdir())
    assert {"manifest.json", "model.safetensors", "config.yaml", "run_card.md"} <= {
        path.name for path in files
    }
    assert sum(path.stat().st_size for path in files) < 0.7 * 2**20
    texts = "".join(path.read_text() for path in files if path.suffix != ".safetensors")
    assert not [folder for folder in ("/root/", "/home/", "/work/", "/tmp/") if folder in texts]


def test_its_vision_is_that_of_the_package():
    vision = json.loads((FOLDER / "manifest.json").read_text())["parts"]["vision"]
    for key, name in (("vit_ckpt", "eva_vit"), ("q_former_model", "blip2")):
        path = PACKAGE_DIR / f"quickstart/weights/{name}.safetensors"
        assert vision[key]["content"] == content_fingerprint(path)


@needs_llm
def test_it_describes_an_image_that_no_training_shows():
    chat, conv = minigpt4.load("minigpt4/quickstart/checkpoint", device="cpu")
    scene, pixels = world.draw("held_out", 0)[:2]
    images = []
    chat.upload_img(Image.fromarray(pixels), conv, images)
    chat.ask("Describe this image in detail.", conv)
    text, _ = chat.answer(conv, images, temperature=0, max_new_tokens=80)
    assert all(item.shape in text and item.colour in text for item in scene.objects), text
