"""The small vision weights: the committed files, and the script that makes them."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import torch

from minigpt4.quickstart import world
from minigpt4.quickstart.drawn_images import DrawnImages
from minigpt4.quickstart.pretrain_vision import Pretraining
from minigpt4.quickstart.vision import QUERIES, Vision, answers

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "minigpt4/quickstart/weights"


def pretrain(output, *arguments):
    command = [
        sys.executable,
        "-m",
        "minigpt4.quickstart.pretrain_vision",
        "--quick",
        "--device",
        "cpu",
        "--batch-size",
        "16",
    ]
    subprocess.run(
        [*command, "--output", str(output), *arguments], cwd=ROOT, check=True, capture_output=True
    )


def test_committed_weights_are_those_of_the_manifest():
    manifest = json.loads((WEIGHTS / "manifest.json").read_text())
    assert set(manifest["sha256"]) == {
        "eva_vit.safetensors",
        "eva_vit.json",
        "blip2.safetensors",
        "blip2.json",
    }
    for name, expected in manifest["sha256"].items():
        assert hashlib.sha256((WEIGHTS / name).read_bytes()).hexdigest() == expected, name
    assert manifest["recipe"]["world"] == world.VERSION
    assert sum((WEIGHTS / name).stat().st_size for name in manifest["sha256"]) <= 16 * 2**20


def test_quick_pretraining_writes_weights_and_resumes(tmp_path):
    pretrain(tmp_path, "--steps", "10")
    pretrain(tmp_path, "--steps", "20", "--resume")
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 20
    assert json.loads((tmp_path / "manifest.json").read_text())["recipe"]["steps"] == 20
    vision = Vision.load(tmp_path)
    tokens, queries = vision(torch.zeros(2, 3, world.IMAGE_SIZE, world.IMAGE_SIZE))
    assert tokens.shape == (2, 65, 32) and queries.shape == (2, len(QUERIES), 64)


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    model = Pretraining(Vision.tiny())
    (batch,) = DrawnImages("pretrain", 0, 1, 16, 14, num_crowded=4)
    image = batch[0].permute(0, 3, 1, 2).float() / 128 - 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss, _ = model.loss(image, *batch[1:], 12)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_answers_say_what_is_in_the_scene():
    scene = world.Scene(
        "beige",
        (
            world.Object("small", "red", "ring", "top"),
            world.Object("large", "blue", "star", "left"),
        ),
    )
    expected = {
        ("count", 0): 2,
        ("background", 0): 1 + world.BACKGROUNDS.index("beige"),
        ("colour", 1): 1 + world.COLOURS.index("blue"),
        ("relation", 0): 4,  # above right of
        ("relation", 1): 0,
        ("shape", 2): 0,
    }
    found = dict(zip(QUERIES, answers(scene), strict=True))
    assert {key: found[key] for key in expected} == expected
