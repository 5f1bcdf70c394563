"""docs/recipes.md is true: on tiny folders, laid out as the downloads, its commands plan, train and answer."""

import json
import re
import shlex
from glob import glob
from pathlib import Path

import pytest
import torch

from minigpt4 import evaluate, train
from minigpt4.common.cli import run_program
from tests.open_small import write_open_small

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "/tmp/open_small"  # in the page
PROGRAMS = {
    "train.py": (train.train, train.parse_args),
    "evaluate.py": (evaluate.evaluate, evaluate.parse_args),
}


def commands(folder):
    """Return the lines of the block that begins with the tiny folders, the shell's work done but for its patterns."""
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```bash\n(python -m tests\.open_small .*?)```", page, flags=re.S)
    block = block.replace("\\\n", " ").replace(FOLDER, str(folder))
    (tiny,) = re.findall(r'^tiny="(.*)"$', block, flags=re.M)
    lines = [
        line for line in block.replace("$tiny", tiny).splitlines() if line.startswith("python ")
    ]
    assert lines.pop(0) == f"python -m tests.open_small {folder}"
    return lines


def run(line):
    """Run a command of the page in this process; $(echo PATTERN) is the one path that is there."""
    found = re.sub(r"\$\(echo (\S+)\)", lambda pattern: glob(pattern[1])[0], line)
    _, script, *words = shlex.split(found)
    program, parse = PROGRAMS[script]
    assert run_program(program, parse(words)) == 0, line


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_open_small(tmp_path)
    monkeypatch.chdir(ROOT)
    return tmp_path


def test_the_recipe_runs_on_tiny_folders(folder, capsys):
    plan1, stage1, plan2, stage2, answer = commands(folder)
    # stage 1: 16 patches make 4 vectors; the projection alone trains, and the template is the tokenizer's
    run(plan1)
    said = capsys.readouterr().out
    assert '<|im_start|>user\\n{}<|im_end|>\\n<|im_start|>assistant\\n"' in said
    assert "validation: " in said and not (folder / "stage1").exists()
    run(stage1)
    assert "llava: 0 of 16 samples skipped" in capsys.readouterr().out
    first = checkpoint(folder / "stage1")
    assert {name.split(".")[0] for name in first["model"]} == {"llama_proj"}
    assert first["model"]["llama_proj.0.weight"].shape == (32, 4 * 32)
    # stage 2 goes on from it, and trains the LLM as a whole
    run(plan2)
    run(stage2)
    second = checkpoint(folder / "stage2")
    assert {name.split(".")[0] for name in second["model"]} == {"llama_proj", "llama_model"}
    moved = (second["model"]["llama_proj.0.weight"] - first["model"]["llama_proj.0.weight"]).norm()
    assert 0 < moved < 0.1 * first["model"]["llama_proj.0.weight"].norm()
    # both are validated on held-out images
    for stage in ("stage1", "stage2"):
        (log,) = (folder / stage).glob("*/log.txt")
        assert json.loads(log.read_text().splitlines()[-1])["val_loss"] > 0
    # by LoRA instead
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    (lora,) = re.findall(r"For LoRA:\s+`--options (.*?)`", page)
    capsys.readouterr()
    run(f"{plan2} {lora}")
    said = capsys.readouterr().out
    assert re.search(r"^llm +lora +0\.0002 ", said, flags=re.M), said
    # an answer of the trained model
    run(answer)
    records = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert (
        len(records) == 1
        and records[0]["image"].endswith("000000000003.jpg")
        and "answer" in records[0]
    )


def checkpoint(folder):
    """Return the checkpoint of the one run in `folder`."""
    (path,) = folder.glob("*/checkpoint_0.pth")
    return torch.load(path, weights_only=True)
