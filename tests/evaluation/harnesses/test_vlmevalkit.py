"""VLMEvalKit's own MiniGPT-4 adapter, unmodified, with this package: it answers as evaluate.py does."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from minigpt4.common.config import Config
from minigpt4.text.templates import VICUNA_V0
from tests.evaluation.harnesses.conftest import MAX_NEW_TOKENS
from tests.small_release import picture

pytestmark = pytest.mark.registry

SCRIPT = Path(__file__).with_name("ask_vlmevalkit.py")
ROOT = Path(__file__).resolve().parents[3]


def test_answers_are_those_of_evaluate(harness, ask, evaluated, items, settings, tmp_path):
    rows = [json.loads(line) for line in (items / "items.jsonl").read_text().splitlines()]
    # The adapter takes a single image.
    asked = {
        row["id"]: [str(items / row["images"][0]), row["question"]]
        for row in rows
        if len(row["images"]) == 1
    }
    model = {
        key.removeprefix("model."): value
        for key, value in settings.items()
        if key.startswith("model.")
    }
    request = {
        "yaml": {"model": model},
        "root": str(ROOT),
        "items": asked,
        "output": str(tmp_path / "answers.json"),
        "prompt_template": VICUNA_V0.training,
        "sampling": {"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS},
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    ask([str(harness("vlmevalkit")), str(SCRIPT), str(tmp_path / "request.json")])
    expected = evaluated("items.jsonl")
    found = json.loads((tmp_path / "answers.json").read_text())
    assert len(found) == 10 and found == {name: expected[name] for name in found}


@pytest.mark.slow
def test_the_model_of_the_quickstart_answers_with_a_warning_about_its_template(
    harness, ask, tmp_path
):
    """Only device and paths in the adapter's YAML file are changed: it uses the template of 2023 and samples answers."""
    checkpoint = ROOT / "output/quickstart/checkpoint.pth"
    if not checkpoint.is_file():
        pytest.skip(f"no {checkpoint.relative_to(ROOT)}: make quickstart writes it")
    args = Namespace(
        cfg_path=str(ROOT / "eval_configs/embedded_eval.yaml"), options=[f"model.ckpt={checkpoint}"]
    )
    keys = "vit_ckpt image_size q_former_model num_query_token llama_model llm_precision prompt_template "
    keys += "end_sym mask_eos_labels ckpt"
    model = {key: Config(args).to_dict()["model"][key] for key in keys.split()} | {
        "low_resource": False
    }
    picture(0).save(tmp_path / "image.png")
    request = {
        "yaml": {"model": model},
        "root": str(ROOT),
        "items": {"image": [str(tmp_path / "image.png"), "Describe this image in detail."]},
        "output": str(tmp_path / "answers.json"),
    }
    (tmp_path / "request.json").write_text(json.dumps(request))
    printed = ask([str(harness("vlmevalkit")), str(SCRIPT), str(tmp_path / "request.json")])
    print(printed[-4000:], (tmp_path / "answers.json").read_text())
    assert "the model was trained with prompt_template '<|im_start|>user" in printed
    assert json.loads((tmp_path / "answers.json").read_text())["image"].strip()
