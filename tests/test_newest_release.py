"""The newest release's own YAML files, only paths, device and length changed, run as users run them on small files."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from minigpt4 import train
from minigpt4.common.cli import run_program
from tests.datasets.instruction_files import NAMES, write_all
from tests.evaluation.benchmarks import official
from tests.golden_v2 import read
from tests.survival.processes import kill_all, start, torchrun

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = read("j_configs/merged.json", {"configs": {}})["configs"]
pytestmark = pytest.mark.skipif(not CONFIGS, reason="this set of fixtures has no j_configs")
STAGE1 = "train_configs/minigpt4_llama2_stage1_pretrain.yaml"
STAGE2 = "train_configs/minigpt4_llama2_stage2_finetune.yaml"
FINETUNE = "train_configs/minigptv2_finetune.yaml"
BENCHMARKS = "eval_configs/minigptv2_benchmark_evaluation.yaml"
THREE = ("llava_conversation", "unnatural_instruction", "refvg")  # several turns, text alone, boxes
SHORT = {"max_epoch": 1, "warmup_steps": 1, "num_workers": 1}
STEPS = 8  # of an epoch in whose middle a run is told to end


@pytest.fixture(scope="module")
def small(release, tmp_path_factory):
    """Give the function that writes a YAML file of the release around small files; all programs find their ViT."""
    root = tmp_path_factory.mktemp("newest")
    infos = write_all(root / "data")
    infos |= {
        name: {"storage": f"{release.root}/{name}_dataset/{{00000..00001}}.tar"}
        for name in ("laion", "cc_sbu")
    }
    infos["cc_sbu_align"] = {"storage": str(release.root / "cc_sbu_align")}

    def write(name, output, ckpt="", datasets=(), benchmarks=(), **run):
        content = json.loads(json.dumps(CONFIGS[name]))
        content["model"] |= {"llama_model": str(release.llama), "ckpt": str(ckpt)}
        if datasets:
            content["datasets"] = {each: content["datasets"][each] for each in datasets}
        for dataset, section in content["datasets"].items():
            section["build_info"] = infos[dataset]
        for benchmark, paths in benchmarks:
            content["evaluation_datasets"][benchmark] |= {
                key: str(path) for key, path in paths.items()
            }
        content["run"] |= {"device": "cpu", "output_dir": str(root / output), **run}
        path = root / f"{output}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    write.root = root
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(release.root / "torch"))
        yield write


def said(*command, **options):
    """Return what a program printed, and what it logged; it must end well, and no library may complain."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stderr
    assert "Warning:" not in done.stderr, done.stderr
    return done.stdout, done.stderr


def checkpoint(root, output, epoch=0):
    (path,) = (root / output).glob(f"*/checkpoint_{epoch}.pth")
    return path


def steps(root, output):
    """Return {step: loss} so far."""
    found = {}
    for path in (root / output).glob("*/metrics.jsonl"):
        for line in path.read_text().splitlines():
            if line.endswith("}"):  # the last one may be half-written
                step = json.loads(line)
                found[step["step"]] = step["loss"]
    return found


def chat(small, name, ckpt):
    """Ask about an image, and once more, through a pipe; return the turns that were saved."""
    saved = small.root / f"{Path(name).stem}.json"
    image = small.root / "data/coco" / NAMES[0]
    lines = [
        "/set temperature 0",
        "/set max_new_tokens 5",
        f"/image {image}",
        "[vqa] what is it?",
        "And?",
        f"/save {saved}",
    ]
    said("demo.py", "--cfg-path", small(name, "chat", ckpt), "--cli", input="\n".join(lines))
    return json.loads(saved.read_text())["turns"]


def test_two_stages_of_minigpt4_and_a_chat(small, release):
    """Stage 2 begins with the weights of stage 1, and a chat in 8 bits with those of stage 2."""
    printed, _ = said("train.py", "--cfg-path", small(STAGE1, "stage1", **SHORT, iters_per_epoch=2))
    assert "Do not use Q-Former here." in printed
    assert list(steps(small.root, "stage1")) == [0, 1]
    first = checkpoint(small.root, "stage1")
    printed, _ = said(
        "train.py", "--cfg-path", small(STAGE2, "stage2", first, **SHORT, iters_per_epoch=2)
    )
    assert f"Checkpoint: {first}" in printed and "Load 4 training prompts" in printed
    second = checkpoint(small.root, "stage2")
    before, after = (torch.load(path, weights_only=True)["model"] for path in (first, second))
    assert list(before) == list(after) == ["llama_proj.weight", "llama_proj.bias"]
    assert not torch.equal(before["llama_proj.weight"], after["llama_proj.weight"])
    assert len(chat(small, "eval_configs/minigpt4_llama2_eval.yaml", second)) == 2


@pytest.fixture(scope="module")
def start_weights(small, release):
    """A checkpoint of MiniGPT-v2 for the small LLM, as the release saves it: LoRA of its rank, and constants."""
    config = json.loads((release.llama / "config.json").read_text())
    width, rank = config["hidden_size"], CONFIGS[FINETUNE]["model"]["lora_r"]
    generator = torch.Generator().manual_seed(5)
    vit_width = json.loads((release.hub / "eva_vit_g.json").read_text())["embed_dim"]
    shapes = {"llama_proj.weight": (width, 4 * vit_width), "llama_proj.bias": (width,)}
    for layer in range(config["num_hidden_layers"]):
        attention = f"llama_model.base_model.model.model.layers.{layer}.self_attn"
        for target in ("q_proj", "v_proj"):
            shapes[f"{attention}.{target}.lora_A.weight"] = (rank, width)
            shapes[f"{attention}.{target}.lora_B.weight"] = (width, rank)
        shapes[f"{attention}.rotary_emb.inv_freq"] = (width // config["num_attention_heads"] // 2,)
    tensors = {
        name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    torch.save({"model": tensors}, small.root / "v2.pth")
    return small.root / "v2.pth"


@pytest.fixture(scope="module")
def finetuned(small, start_weights):
    """Finetune MiniGPT-v2 on three datasets without interruption, in this process; return its checkpoint."""
    path = small(FINETUNE, "whole", start_weights, THREE, **SHORT, iters_per_epoch=STEPS)
    assert run_program(train.train, train.parse_args(["--cfg-path", str(path)])) == 0
    return checkpoint(small.root, "whole")


def test_a_finetuning_that_was_told_to_end_in_mid_epoch_resumes_exactly(
    small, start_weights, finetuned
):
    path = small(FINETUNE, "resumed", start_weights, THREE, **SHORT, iters_per_epoch=STEPS)
    command = [sys.executable, "train.py", "--cfg-path", path, "--resume", "auto"]
    process = start(command, small.root / "resumed.txt")
    try:
        while process.poll() is None and 1 not in steps(small.root, "resumed"):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 128 + signal.SIGTERM, (
            small.root / "resumed.txt"
        ).read_text()
    finally:
        kill_all(process)
    assert 1 < len(steps(small.root, "resumed")) < STEPS
    _, beside = said(*command[1:])
    assert "LLM: texts are packed" in beside and "layers are lean" not in beside
    assert steps(small.root, "resumed") == steps(small.root, "whole")
    kinds = [
        torch.load(each, weights_only=True)
        for each in (finetuned, checkpoint(small.root, "resumed"))
    ]
    whole, resumed = (kind["model"] for kind in kinds)
    start_of = torch.load(start_weights, weights_only=True)["model"]
    assert (
        whole.keys()
        == resumed.keys()
        == {name for name in start_of if not name.endswith("inv_freq")}
    )
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
        assert not torch.equal(tensor, start_of[name]), name


def test_two_ranks_of_which_one_has_text_alone(small, start_weights):
    """In the second step rank 0 has no image, and rank 1 has; in the third it is the other way round."""
    path = small(FINETUNE, "ranks", start_weights, THREE, **SHORT, iters_per_epoch=3)
    output = small.root / "ranks.txt"
    process = start(torchrun("train.py", "--cfg-path", path), output)
    try:
        assert process.wait(timeout=300) == 0, output.read_text()
    finally:
        kill_all(process)
    state = torch.load(checkpoint(small.root, "ranks"), weights_only=True)
    drawn = [rank["data"]["progress"] for rank in state["progress"]["ranks"]]
    assert [rank["unnatural_instruction"]["batches"] for rank in drawn] == [1, 1]
    assert [sum(each["batches"] for each in rank.values()) for rank in drawn] == [3, 3]
    taken = [int(each["step"]) for each in state["optimizer"]["state"].values()]
    # in each step there was an image somewhere, so the projection moved
    assert taken == [3] * len(state["model"])


def test_evaluation_and_chat_of_the_finetuned_model(small, finetuned):
    """Greedy answers, a choice among candidates, a chat in 8 bits: all from the finetuned checkpoint."""
    paths = {}
    for name, write in (
        ("refcoco", official.refcoco),
        ("gqa", official.gqa),
        ("iconvqa", official.iconqa),
    ):
        paths[name] = {"img_path": small.root / name / "images", **write(small.root / name)}
    config = small(BENCHMARKS, "benchmarks", finetuned, benchmarks=paths.items())
    said("evaluate.py", "--cfg-path", config, "--tasks", *paths, "--output", small.root / "results")
    for name in paths:
        results = json.loads((small.root / "results" / name / "results.json").read_text())
        assert 0 <= results["metrics"]["accuracy"]["value"] <= 1
    assert len(chat(small, "eval_configs/minigptv2_eval.yaml", finetuned)) == 2
