"""The same items for all harnesses, and evaluate.py's answers to them."""

import json
import os
from argparse import Namespace
from pathlib import Path
from subprocess import run

import pytest

from minigpt4.common.config import Config
from minigpt4.evaluation.run import evaluate_benchmarks
from tests.evaluation.harnesses.environment import (
    HARNESSES,
    make_environment,
    registry_is_out_of_reach,
)
from tests.small_release import picture

CFG_PATH = Path(__file__).resolve().parents[3] / "eval_configs/minigpt4_eval.yaml"
WORDS = [
    "what is it?",
    "which is the old wall",
    "who watched?",
    "and the water?",
    "is there a door in the house?",
]
MAX_NEW_TOKENS = 8


@pytest.fixture(scope="session")
def harness():
    """Return a function that returns the Python of a harness's environment. Skips if the registry cannot be reached."""

    def python(name):
        assert name in HARNESSES
        if os.environ.get("MINIGPT4_OFFLINE"):
            pytest.skip("MINIGPT4_OFFLINE is set")
        try:
            return make_environment(name)
        except RuntimeError:
            if reason := registry_is_out_of_reach():
                pytest.skip(f"the package registry cannot be reached: {reason}")
            raise

    return python


@pytest.fixture(scope="session")
def items(tmp_path_factory):
    """Return a folder with ten images and `items.jsonl`: ten questions with one image, two images or none."""
    folder = tmp_path_factory.mktemp("items")
    rows = []
    for number in range(10):
        picture(number).save(folder / f"{number}.png")
        rows.append({"images": [f"{number}.png"], "question": WORDS[number % len(WORDS)]})
    rows += [
        {"images": ["0.png", "1.png"], "question": WORDS[0]},
        {"images": [], "question": WORDS[2]},
    ]
    options = ["the old wall", "water", "no"]
    for number, row in enumerate(rows):
        row |= {"id": str(number), "answer": options[number % 3]}
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [row | {"options": options} for row in rows]
    (folder / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def settings(release):
    """Return the settings, in the form of --options, with which each harness opens the same model."""
    model = {
        "ckpt": release.checkpoint,
        "llama_model": release.llama,
        "low_resource": False,
        "llm_precision": "fp32",
    }
    return {f"model.{key}": str(value) for key, value in model.items()} | {"run.device": "cpu"}


@pytest.fixture(scope="session")
def evaluated(release, items, settings, tmp_path_factory):
    """Return a function: evaluate.py's answers to a file of items, {id: answer}; `more` are keys of the section."""

    def evaluated(file, **more):
        section = {
            "eval_file_path": items / file,
            "img_path": items,
            "max_new_tokens": MAX_NEW_TOKENS,
            **more,
        }
        options = [f"evaluation_datasets.own_jsonl.{key}={value}" for key, value in section.items()]
        options += [f"{key}={value}" for key, value in settings.items()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCH_HOME", str(release.root / "torch"))
            cfg = Config(Namespace(cfg_path=str(CFG_PATH), options=options))
            path = evaluate_benchmarks(
                cfg, ["own_jsonl"], tmp_path_factory.mktemp("results"), "cpu"
            )["own_jsonl"]
        return {record["id"]: record["answer"] for record in json.loads(path.read_text())["items"]}

    return evaluated


@pytest.fixture(scope="session")
def ask(release):
    """Return a function that runs a command to its end, without network access."""

    def ask(command, **env):
        offline = dict.fromkeys(
            ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"
        )
        result = run(command, env={**release.env, **offline, **env}, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-8000:]
        return result.stdout + result.stderr

    return ask
