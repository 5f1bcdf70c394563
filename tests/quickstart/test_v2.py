"""The small MiniGPT-v2: annotation files, pretraining labels, chance levels, and the whole program on a toy LLM."""

import hashlib
import json
import pickle
import re

import numpy as np
import pytest
import torch

from minigpt4.models.vision.eva_vit import EvaVit
from minigpt4.quickstart import alignment, instructions, pretrain_boxes, v2, world
from minigpt4.quickstart.drawn_images import NOTHING
from minigpt4.quickstart.pretrain_vision import normalise

SHORT = ["run.iters_per_epoch=3", "run.device=cpu"]


@pytest.fixture(scope="module")
def cache(release, tmp_path_factory):
    """A cache root with a few images in the official formats, and the toy LLM."""
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instructions, "NUM_IMAGES", {"train": 10, "crowded": 10, "val": 5})
        patch.setattr(alignment, "NUM_IMAGES", 200)
        (root / "embedded").mkdir()
        (root / "embedded/llm").symlink_to(release.llama)
        v2.prepare(str(root))
    return root


@pytest.fixture(scope="module")
def data(cache):
    return cache / f"embedded/instructions-v{instructions.VERSION}"


def test_official_files(data):
    refs = pickle.loads((data / "refcoco/refs(unc).p").read_bytes())
    instances = json.loads((data / "refcoco/instances.json").read_text())
    by_split = {split: [ref for ref in refs if ref["split"] == split] for split in ("train", "val")}
    assert len({ref["image_id"] for ref in by_split["train"]}) == 20
    assert {ref["image_id"] for ref in by_split["val"]} == set(range(21, 26))
    scene, _, object_map = world.draw("held_out", 0)
    first = by_split["val"][0]
    assert first["sentences"][0]["raw"] == f"{scene.objects[0].colour} {scene.objects[0].shape}"
    left, top, width, height = instances["annotations"][first["ann_id"]]["bbox"]
    inside = np.zeros_like(object_map)
    inside[top : top + height, left : left + width] = 1
    mask = object_map == 1
    assert (inside[mask] == 1).all() and mask[top].any() and mask[top + height - 1].any()
    assert mask[:, left].any() and mask[:, left + width - 1].any()
    trained = json.loads((data / "gqa/train_balanced_questions.json").read_text())
    asked = json.loads((data / "evaluation/testdev_balanced_questions.json").read_text())
    assert not {row["question"] for row in trained} & {row["question"] for row in asked.values()}
    assert len(trained) == 20 and len(asked) == 5


def test_each_object_is_asked_about_once_in_a_row(data):
    rows = json.loads((data / "multitask/multi_task_conversation.json").read_text())
    instances = json.loads((data / "refcoco/instances.json").read_text())
    of_image = {}
    for row in instances["annotations"]:
        of_image.setdefault(row["image_id"], []).append(row["bbox"])
    assert len(rows) == 20
    tasks = set()
    for row in rows:
        turns = row["conversations"]
        boxes = of_image[int(row["id"])]
        assert len(turns) == 2 * len(boxes) and turns[0]["value"].startswith("<image>\n[")
        assert not any("<image>" in turn["value"] for turn in turns[1:])
        tasks |= {re.search(r"\[(\w+)\]", turn["value"])[1] for turn in turns[::2]}
        written = re.findall(r"\{[<>\d]+\}", json.dumps(turns))
        assert len(written) == len(set(written))
    # images of training have one to three objects, crowded ones four to six
    assert all(len(of_image[number]) > 3 for number in range(11, 21))
    assert all(len(of_image[number]) <= 3 for number in range(1, 11))
    assert tasks == {"refer", "identify", "vqa"}


def test_the_start_of_the_projection_names_what_a_vector_shows(cache, data):
    """Vectors of images that the map was not fitted on are nearest to the embedding of their own colour's word."""
    state = torch.load(data / "llama_proj.pth", weights_only=True)["model"]
    vit = v2.WEIGHTS.with_name("eva_vit_boxes.safetensors")
    vectors, labels = alignment.look(vit, first=5000, count=50)
    found = vectors @ state["llama_proj.weight"].T + state["llama_proj.bias"]
    column = list(pretrain_boxes.LABELS).index("colour")
    codes = alignment.codes_of("colour", cache / "embedded/llm")
    centred = codes - codes.mean(0)
    shown = labels[:, column] != NOTHING
    guesses = (found[shown] @ centred.T - 0.5 * centred.square().sum(1)).argmax(1)
    assert shown.sum() > 50
    assert (guesses == labels[shown, column]).float().mean() > 0.5  # chance: an eighth


def test_a_vector_is_asked_about_the_object_of_its_strip():
    scene, _, object_map = world.draw("stage1", 3)
    labels = pretrain_boxes.strip_labels(scene, object_map, 14)
    names = list(pretrain_boxes.LABELS)
    boxes = world.boxes(scene, object_map)
    assert (
        labels.shape == (16, len(names))
        and (labels[:, names.index("count")] == len(boxes) - 1).all()
    )
    found = set()
    for number, row in enumerate(labels):
        own = dict(zip(names, row, strict=True))
        strip = object_map[number // 2 * 14 :][:14, number % 2 * 56 :][:, :56]
        if not own["object"]:
            assert own["shape"] == NOTHING and (strip > 0).mean() < 3 * pretrain_boxes.MIN_COVER
            continue
        counts = np.bincount(strip.ravel(), minlength=len(boxes) + 1)[1:]
        item, box = scene.objects[counts.argmax()], boxes[counts.argmax()]
        assert (
            world.SHAPES[own["shape"]] == item.shape and world.COLOURS[own["colour"]] == item.colour
        )
        assert own["left tens"] * 10 + own["left units"] == 100 * box[0] // 112
        assert own["bottom tens"] * 10 + own["bottom units"] == 100 * (box[1] + box[3]) // 112
        found.add(counts.argmax())
    assert found == set(range(len(boxes)))


def test_a_few_steps_of_pretraining_lower_the_loss():
    torch.manual_seed(0)
    config = EvaVit(32, 1, 2, 64, 14, world.IMAGE_SIZE)
    model = pretrain_boxes.Strips(config.build(world.IMAGE_SIZE, device="cpu"), config.width)
    images, labels = pretrain_boxes.batch("pretrain", 0, 8, config.patch_size)
    pixels = normalise(images, "cpu")
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(15):
        loss = model.loss(pixels, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_committed_weights_are_those_of_the_manifest():
    manifest = json.loads(v2.WEIGHTS.read_text())
    for name, expected in manifest["sha256"].items():
        assert hashlib.sha256((v2.WEIGHTS.parent / name).read_bytes()).hexdigest() == expected, name
        assert (v2.WEIGHTS.parent / name).stat().st_size <= 6 * 2**20
    assert manifest["recipe"]["world"] == world.VERSION


def test_chance():
    items = [{"reference": {"box": [10, 10, 20, 20]}}] * 3 + [
        {"reference": {"box": [80, 80, 20, 20]}}
    ]
    text, share = v2.best_constant_box(
        [(80, 80, 20, 20), (11, 10, 20, 20), (0, 0, 112, 112)], items
    )
    assert share == 0.75 and text == "{<9><8><27><26>}"
    assert v2.random_box([(10, 10, 20, 20)], items) == 0.75
    groups = [{"group": "colour", "reference": answer} for answer in ("red", "red", "blue")]
    assert v2.best_constant_answers([*groups, {"group": "", "reference": ["a star"]}]) == 0.75


def test_the_whole_program(cache, tmp_path, capfd):
    """Three steps on a toy LLM, without judging the figures; only training runs in a process of its own."""
    arguments = ["--cache-root", str(cache), "--output", str(tmp_path), "--options", *SHORT]
    assert v2.main(arguments) == 0
    report, said = json.loads((tmp_path / "report.json").read_text()), capfd.readouterr().out
    assert set(report["tasks"]) == {"[refer]", "[identify]", "[vqa]"}
    for task, row in report["tasks"].items():
        assert row["questions"] == 5 and 0 <= row["blank"] <= 1 and 0 < row["best_constant"] <= 1
        assert report["examples"][task]["question"].startswith(task) and task in said
    weights = torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"]
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in weights if ".lora_" in name}
    assert adapted == {"q_proj", "v_proj"} and "llama_proj.weight" in weights
    assert weights["llama_proj.weight"].shape[1] == 4 * 192
    # existing results are reused
    assert v2.main(arguments) == 0
    assert "is there; remove" in capfd.readouterr().out
