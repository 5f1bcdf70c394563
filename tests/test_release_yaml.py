"""The YAML files of the 2023 release, only paths and device changed (and a length that a test can wait for)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHORT = {
    "run.iters_per_epoch": 3,
    "run.max_epoch": 2,
    "run.batch_size_train": 4,
    "run.num_workers": 1,
}


def run(release, program, yaml, *arguments, **options):
    command = [sys.executable, program, "--cfg-path", yaml, *arguments, *release.options(**options)]
    return subprocess.run(
        command, cwd=ROOT, env=release.env, capture_output=True, text=True, timeout=300
    )


def storage(release, *names):
    return {
        f"datasets.{name}.build_info.storage": f"{release.root}/{name}_dataset/{{00000..00001}}.tar"
        for name in names
    }


@pytest.fixture(scope="module")
def stage1(release):
    """Train the first stage; return (what it printed, its folder)."""
    yaml = "train_configs/minigpt4_stage1_pretrain.yaml"
    output = release.root / "stage1"
    options = {**storage(release, "laion", "cc_sbu"), **SHORT, "run.output_dir": output}
    result = run(release, "train.py", yaml, **options)
    assert result.returncode == 0, result.stderr
    (folder,) = output.iterdir()
    return result, folder


def test_stage_1_trains_and_says_what_2023_said(stage1):
    result, folder = stage1
    said = [
        line
        for line in result.stdout.splitlines()
        if line.startswith(("Loading", "Train", "llama", "number"))
    ]
    assert said[:6] == [
        f"Loading {what}"
        for what in ("VIT", "VIT Done", "Q-Former", "Q-Former Done", "LLAMA", "LLAMA Done")
    ]
    assert said[6:8] == ["llama_proj.weight", "llama_proj.bias"]
    assert "Start training epoch 1, 3 iters per inner epoch." in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "Start-up: " in line]
    phases = [phase.rsplit(" ", 1)[0] for phase in line.split("(")[1].rstrip(")").split(", ")]
    assert {
        "imports",
        "configuration",
        "ViT",
        "Q-Former",
        "LLM",
        "first batch",
        "first step",
    } <= set(phases)
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoint_0.pth",
        "checkpoint_1.pth",
        "log.txt",
        "loss.png",
        "metrics.jsonl",
        "result",
        "run_card.json",
        "run_card.md",
    ]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(6))
    checkpoint = torch.load(folder / "checkpoint_1.pth", weights_only=True)
    assert set(checkpoint) == {"model", "optimizer", "config", "scaler", "epoch", "progress"}
    assert set(checkpoint["model"]) == {"llama_proj.weight", "llama_proj.bias"}


def test_stage_2_starts_from_the_checkpoint_of_stage_1(release, stage1):
    checkpoint = stage1[1] / "checkpoint_1.pth"
    options = {
        "datasets.cc_sbu_align.build_info.storage": release.root / "cc_sbu_align",
        "model.ckpt": checkpoint,
        "run.output_dir": release.root / "stage2",
        **SHORT,
    }
    result = run(release, "train.py", "train_configs/minigpt4_stage2_finetune.yaml", **options)
    assert result.returncode == 0, result.stderr
    assert "Load 4 training prompts" in result.stdout
    assert f"Load BLIP2-LLM Checkpoint: {checkpoint}" in result.stdout
    assert "Loaded 6 records for train split from the dataset." in result.stderr


def test_the_eval_file_answers_in_8_bit(release, tmp_path):
    pictures = release.root / "cc_sbu_align" / "image"
    answers = tmp_path / "answers.jsonl"
    arguments = ["--images", str(pictures), "--output", str(answers), "--max-new-tokens", "5"]
    for expected in ("6 answers added", "0 answers added"):  # a second call has nothing left to do
        options = {"model.ckpt": release.checkpoint}
        result = run(
            release, "evaluate.py", "eval_configs/minigpt4_eval.yaml", *arguments, **options
        )
        assert result.returncode == 0, result.stderr
        assert expected in result.stdout
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [Path(record["image"]).stem for record in records] == [str(index) for index in range(6)]
    assert all(isinstance(record["answer"], str) for record in records)


@pytest.mark.parametrize("stage", ["stage1_pretrain", "stage2_finetune"])
def test_dry_run_of_the_unshortened_file_prints_the_plan(release, stage):
    options = (
        {**storage(release, "laion", "cc_sbu")}
        if stage == "stage1_pretrain"
        else {
            "datasets.cc_sbu_align.build_info.storage": release.root / "cc_sbu_align",
            "model.ckpt": release.checkpoint,
        }
    )
    before = {path: path.stat().st_mtime_ns for path in release.root.rglob("*")}
    result = run(
        release, "train.py", f"train_configs/minigpt4_{stage}.yaml", "--dry-run", **options
    )
    assert result.returncode == 0, result.stderr
    assert "llama_proj" in result.stdout and "2,624" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in release.root.rglob("*")} == before
