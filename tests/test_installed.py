"""What the project ships works from any folder: paths of YAML files, and programs of an installed package."""

import os
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest

from minigpt4.common.config import Config
from minigpt4.common.config_paths import find_path
from tests.common.test_own_code import installed

ROOT = Path(__file__).resolve().parents[1]
YAML = [f"{path.parent.name}/{path.name}" for path in sorted(ROOT.glob("*_configs/*.yaml"))]


@pytest.mark.parametrize("yaml", YAML)
def test_shipped_yaml_is_read_from_another_folder(yaml, release, tmp_path, monkeypatch):
    """By its path in the project, or whichever leads to it; with its prompts and small weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(release.root / "torch"))
    # small files, none fetched
    options = [f"model.llama_model={release.llama}", "model.ckpt=", "model.vision_model="]
    for cfg_path in (yaml, str(ROOT / yaml), os.path.relpath(ROOT / yaml)):
        cfg = Config(Namespace(cfg_path=cfg_path, options=options))
        assert not cfg.model_cfg.prompt_path or Path(cfg.model_cfg.prompt_path).is_file()
        assert "://" in cfg.model_cfg.vit_ckpt or Path(cfg.model_cfg.vit_ckpt).is_file()


def test_a_path_is_looked_for_here_then_beside_the_yaml_then_in_the_project(tmp_path, monkeypatch):
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder in (here, beside):
        folder.mkdir()
    (beside / "a.pth").touch()
    (beside / "shards").mkdir()
    for name in ("shards/3.tar", "laion_1.tar", "shards/laion_1.tar"):
        (beside / name).touch()
    monkeypatch.chdir(here)
    assert find_path("a.pth", [beside]) == str(beside / "a.pth")
    (here / "shards").mkdir()  # the files decide, not the folder
    for pattern in (
        "shards/{0..9}.tar",
        "shards/laion_{0..1}.tar",
        "laion_?.tar",
        "*.tar",
        "{a,l{a..b}ion_1}.tar",
    ):
        assert find_path(pattern, [beside]) == str(beside / pattern)
    assert find_path("prompts/alignment.txt", [beside]) == str(ROOT / "prompts/alignment.txt")
    (here / "a.pth").touch()
    as_given = [
        "a.pth",
        "b.pth",
        "{0..9}.zip",
        "${env.cache_root}/x",
        "~/a.pth",
        "$HOME/a",
        "/a",
        "https://a.org/a.pth",
    ]
    as_given += ["auto", "", "tests/conftest.py", "x" * 5000, "a\0b"]
    for path in as_given:
        assert find_path(path, [beside]) == path


def test_paths_of_data_and_own_weights_are_beside_the_yaml(release, tmp_path, monkeypatch):
    """Also where interpolations, lists and folders of images are; what is written stays in the working directory."""
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home / "images", home / "shards", here):
        folder.mkdir(parents=True)
    (home / "c.jsonl").touch()
    (home / "shards/0.tar").touch()
    text = "model: {arch: mini_gpt4, llama_model: llm, ckpt: '${env.cache_root}/c.pth'}\nenv: {cache_root: cache}\n"
    text += "datasets:\n  a: {builder: image_text_jsonl, build_info: {storage: c.jsonl, images: images}}\n"
    text += "  b: {builder: webdataset, build_info: {storage: ['shards/{0..1}.tar', /x/2.tar]}}\n"
    text += "run: {output_dir: images}\n"
    (home / "c.yaml").write_text(text)
    (home / "llm").symlink_to(release.llama)
    (here / "cache").mkdir()
    (here / "cache/c.pth").write_bytes(release.checkpoint.read_bytes())
    monkeypatch.chdir(here)
    monkeypatch.setenv("TORCH_HOME", str(release.root / "torch"))
    cfg = Config(Namespace(cfg_path=home / "c.yaml", options=["model.model_type=pretrain_vicuna"]))
    assert cfg.model_cfg.llama_model == str(home / "llm") and cfg.model_cfg.ckpt == "cache/c.pth"
    assert cfg.datasets_cfg.a.build_info == {
        "storage": str(home / "c.jsonl"),
        "images": str(home / "images"),
    }
    assert cfg.datasets_cfg.b.build_info.storage == [str(home / "shards/{0..1}.tar"), "/x/2.tar"]
    assert cfg.run_cfg.output_dir == "images"


@pytest.mark.slow
def test_the_programs_of_an_installed_package_find_what_is_shipped(release, tmp_path):
    names, target = installed(tmp_path)
    assert {f"minigpt4/{yaml}" for yaml in YAML} | {"minigpt4/prompts/alignment.txt"} <= names
    (metadata,) = target.glob("minigpt4_research-*.dist-info/METADATA")
    assert "Requires-Dist: torch" in metadata.read_text() and "pytest" not in metadata.read_text()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    options = [f"model.llama_model={release.llama}", "model.ckpt=", "run.num_workers=0"]
    options += [f"datasets.cc_sbu_align.build_info.storage={release.root}/cc_sbu_align"]
    command = [
        target / "bin/minigpt4-train",
        "--dry-run",
        "--cfg-path",
        "train_configs/embedded_stage2_finetune.yaml",
    ]
    env = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(
        [*command, "--options", *options], cwd=elsewhere, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(target / "minigpt4/prompts/embedded_alignment.txt") in done.stdout
    assert not list(elsewhere.iterdir())
    for program in ("minigpt4-demo", "minigpt4-evaluate", "minigpt4-serve"):
        done = subprocess.run(
            [target / "bin" / program, "--help"],
            cwd=elsewhere,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and done.stdout.startswith(f"usage: {program} "), done.stderr
