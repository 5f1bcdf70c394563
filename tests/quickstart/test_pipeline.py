"""Both stages of the quickstart by train.py, with the committed vision weights and a toy LLM, in seconds."""

import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import torch
from PIL import Image

from minigpt4.quickstart import prepare, world

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["run.iters_per_epoch=3", "run.batch_size_train=2", "run.device=cpu"]


def train(cache, yaml, output, *options, expect=0):
    command = [
        sys.executable,
        "train.py",
        "--cfg-path",
        f"train_configs/{yaml}",
        "--options",
        f"env.cache_root={cache}",
    ]
    command += [*SHORT, f"run.output_dir={output}", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == expect, result.stderr
    return next(output.glob("*/checkpoint_0.pth"))


def test_data_has_the_layout_of_the_real_sets(cache):
    data = prepare.data_folder(cache / "embedded")
    with tarfile.open(data / "cc_sbu/00003.tar") as tar:
        assert tar.getnames()[:3] == ["000030000.jpg", "000030000.txt", "000030000.json"]
        record = json.load(tar.extractfile("000030000.json"))
        assert record["caption"] == tar.extractfile("000030000.txt").read().decode()
        assert record["width"] == record["original_width"] == world.IMAGE_SIZE
    assert json.loads((data / "laion/00007_stats.json").read_text())["successes"] == 4
    annotations = json.loads((data / "cc_sbu_align/filter_cap.json").read_text())["annotations"]
    assert (
        len({a["image_id"] for a in annotations})
        == len(list((data / "cc_sbu_align/image").iterdir()))
        == 6
    )
    assert [a["image_id"] for a in annotations if "instruction" not in a] == list("012345")
    assert [a["image_id"] for a in annotations if "instruction" in a] == list("1245")


def test_prepared_data_is_used_again(cache):
    before = (cache / "embedded/data-v3/cc_sbu_align/filter_cap.json").stat().st_mtime_ns
    prepare.prepare(cache)
    assert (cache / "embedded/data-v3/cc_sbu_align/filter_cap.json").stat().st_mtime_ns == before


def test_both_stages_train_the_projection_only(cache, tmp_path):
    first = train(cache, "embedded_stage1_pretrain.yaml", tmp_path / "stage1")
    second = train(
        cache, "embedded_stage2_finetune.yaml", tmp_path / "stage2", f"model.ckpt={first}"
    )
    projections = [torch.load(path, weights_only=True)["model"] for path in (first, second)]
    assert all(set(p) == {"llama_proj.weight", "llama_proj.bias"} for p in projections)
    assert projections[0]["llama_proj.weight"].shape[1] == 256
    assert not torch.equal(projections[0]["llama_proj.weight"], projections[1]["llama_proj.weight"])
    assert settings_of_the_demo(cache, second, tmp_path / "dialogue.json") == {"temperature": 0.0}


def settings_of_the_demo(cache, checkpoint, path):
    """Return the settings with which demo.py starts; greedy is the default with the vision weights of the package."""
    options = [f"model.ckpt={checkpoint}", f"env.cache_root={cache}", "run.device=cpu"]
    command = [sys.executable, "demo.py", "--cfg-path", "eval_configs/embedded_eval.yaml", "--cli"]
    command += ["--options", *options]
    subprocess.run(
        command, cwd=ROOT, input=f"/save {path}\n", capture_output=True, text=True, check=True
    )
    return json.loads(path.read_text())["settings"]


def test_own_images_take_the_place_of_the_drawn_ones(cache, tmp_path, monkeypatch):
    """The program in docs/embedded.md, run verbatim, makes a folder that can be trained on."""
    (tmp_path / "my_set/image").mkdir(parents=True)
    captions = {
        "sunset": ("orange", "An orange evening sky."),
        "sea": ("navy", "The sea at night."),
    }
    for name, (colour, caption) in captions.items():
        Image.new("RGB", (300, 200), colour).save(tmp_path / f"my_set/image/{name}.jpg")
        (tmp_path / f"my_set/image/{name}.txt").write_text(caption + "\n")
    (program,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/embedded.md").read_text(), flags=re.S
    )
    assert len(program.strip().splitlines()) < 10
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    written = json.loads((tmp_path / "my_set/filter_cap.json").read_text())["annotations"]
    assert {a["image_id"]: a["caption"] for a in written} == {
        name: text for name, (_, text) in captions.items()
    }
    first = train(cache, "embedded_stage1_pretrain.yaml", tmp_path / "stage1")
    storage = f"datasets.cc_sbu_align.build_info.storage={tmp_path / 'my_set'}"
    assert train(
        cache, "embedded_stage2_finetune.yaml", tmp_path / "stage2", f"model.ckpt={first}", storage
    ).is_file()
