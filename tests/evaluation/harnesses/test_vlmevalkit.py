"""VLMEvalKit's own MiniGPT-4 adapter, unmodified, with this package: the answers are those of evaluate.py."""

import json
from pathlib import Path

import pytest

from minigpt4.text.templates import VICUNA_V0
from tests.evaluation.harnesses.conftest import MAX_NEW_TOKENS

pytestmark = pytest.mark.registry

SCRIPT = Path(__file__).with_name("ask_vlmevalkit.py")


def test_answers_are_those_of_evaluate(harness, ask, evaluated, items, settings, tmp_path):
    rows = [json.loads(line) for line in (items / "items.jsonl").read_text().splitlines()]
    # the adapter takes one image
    asked = {row["id"]: [str(items / row["images"][0]), row["question"]] for row in rows if len(row["images"]) == 1}
    model = {key.removeprefix("model."): value for key, value in settings.items() if key.startswith("model.")}
    request = {
        "yaml": {"model": model},
        "root": str(SCRIPT.parents[3]),
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
