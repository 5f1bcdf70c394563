"""Twenty optimisation steps of the real model, task and runner equal those of the 2023 release (golden set d)."""

import dataclasses
import json
import re
from argparse import Namespace
from itertools import cycle

import numpy as np
import pytest
import torch

from minigpt4.common.checkpoint import load_checkpoint
from minigpt4.common.config import Config
from minigpt4.common.registry import registry
from minigpt4.runners.run_config import RunConfig
from minigpt4.tasks import setup_task
from tests.golden import GOLDEN

SET = GOLDEN / "d_optim"
RUNS = json.loads((SET / "runs.json").read_text())
RUN_KEYS = [field.name for field in dataclasses.fields(RunConfig)]
# Float32 noise between torch versions, measured (README of the golden set): 4.0e-6 on weights, 1.4e-6 on losses.
WEIGHTS, LOSS, LR = 2e-5, 2e-5, 1e-15


def golden_batches():
    images = np.load(SET / "batches.npz")
    texts = RUNS["text_input"]
    return [
        {"image": torch.from_numpy(images[f"image_{i}"]), "text_input": text}
        for i, text in enumerate(texts)
    ]


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    """The golden weight files, with the sidecars that say how small they are."""
    folder = tmp_path_factory.mktemp("model")
    dims = json.loads((GOLDEN / "c_minigpt4/config.json").read_text())
    for name in ("eva_vit.safetensors", "blip2.safetensors", "llama"):
        (folder / name).symlink_to((GOLDEN / "c_minigpt4/model" / name).resolve())
    vit, qformer = dims["vit"], dims["qformer"]
    sidecar = {key: vit[key] for key in ("embed_dim", "depth", "num_heads", "patch_size")}
    (folder / "eva_vit.json").write_text(json.dumps({**sidecar, "mlp_dim": vit["mlp_hidden"]}))
    bert = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sidecar = {key: qformer["bert_config"][key] for key in bert}
    sidecar |= {
        "cross_attention_frequency": qformer["cross_attention_freq"],
        "encoder_width": qformer["encoder_width"],
    }
    (folder / "blip2.json").write_text(json.dumps(sidecar))
    return folder


def configuration(run, files, output_dir, **changes):
    """Return the checked configuration of a golden run, through the same code as train.py's."""
    settings = {f"run.{key}": value for key, value in run.items() if key in RUN_KEYS}
    settings |= {
        "model.arch": "mini_gpt4",
        "model.model_type": "pretrain_vicuna",
        "model.image_size": golden_batches()[0]["image"].shape[-1],
        "model.vit_ckpt": files / "eva_vit.safetensors",
        "model.q_former_model": files / "blip2.safetensors",
        "model.llama_model": files / "llama",
        "model.num_query_token": json.loads((GOLDEN / "c_minigpt4/config.json").read_text())[
            "qformer"
        ]["query_length"],
        "model.vit_precision": "fp32",
        "model.check_llm": False,  # its weights are random
        "model.max_txt_len": run["max_txt_len"],
        "model.end_sym": f"'{run['end_sym']}'",
        "run.task": "image_text_pretrain",
        "run.lr_sched": "linear_warmup_cosine_lr",
        "run.accum_reduction": "sum",
        "run.batch_size_train": len(RUNS["text_input"][0]),
        "run.num_workers": 0,
        "run.device": "cpu",
        "run.output_dir": output_dir,
        **changes,
    }
    (output_dir / "empty.yaml").write_text("run: {}")
    options = [f"{key}={value}" for key, value in settings.items()]
    return Config(Namespace(cfg_path=str(output_dir / "empty.yaml"), options=options))


def build(cfg, initial):
    """Return the runner around the model, its projection at the golden start."""
    task = setup_task(cfg)
    model = task.build_model(cfg)
    model.llama_proj.load_state_dict(
        {name: torch.from_numpy(initial[f"init_{name}"]) for name in ("weight", "bias")}
    )
    return registry.get_runner_class(cfg.run_cfg.runner)(
        cfg=cfg, task=task, model=model, datasets={}
    )


def largest(found, expected):
    return np.abs(np.asarray(found, dtype=np.float64) - expected).max()


@pytest.mark.parametrize("run", RUNS["runs"], ids=lambda run: run["name"])
def test_steps(run, model_files, tmp_path):
    expected = np.load(SET / f"run_{run['name']}.npz")
    runner = build(configuration(run, model_files, tmp_path), expected)
    runner.train(cycle(golden_batches()))
    steps = [
        json.loads(line) for line in (runner.output_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(steps) == run["steps"]
    assert largest([step["lr"] for step in steps], expected["lr"]) <= LR
    assert largest([step["loss"] for step in steps], expected["loss"]) <= LOSS
    for name, parameter in runner.model.llama_proj.named_parameters():
        assert largest(parameter.detach(), expected[f"final_{name}"]) <= WEIGHTS
        for moment in ("exp_avg", "exp_avg_sq"):
            assert (
                largest(runner.optimizer.state[parameter][moment], expected[f"{moment}_{name}"])
                <= WEIGHTS
            )
        assert runner.optimizer.state[parameter]["step"] == run["optimizer_updates"]
    moved = largest(runner.model.llama_proj.weight.detach(), expected["init_weight"])
    assert moved == pytest.approx(run["weight_moved"], abs=WEIGHTS)


@pytest.mark.parametrize("run", RUNS["runs"], ids=lambda run: run["name"])
def test_groups_and_checkpoint(run, model_files, tmp_path):
    """The parameter groups and the five keys of the saved file, but for the buffers of 2023."""
    runner = build(
        configuration(run, model_files, tmp_path), np.load(SET / f"run_{run['name']}.npz")
    )
    names = {id(parameter): name for name, parameter in runner.model.named_parameters()}
    for group, expected in zip(runner.optimizer.param_groups, run["param_groups"], strict=True):
        assert [names[id(parameter)] for parameter in group["params"]] == expected["names"]
        assert list(group["betas"]) == expected["betas"]
        assert all(group[key] == expected[key] for key in ("weight_decay", "eps", "amsgrad"))
    runner.train(cycle(golden_batches()))
    saved, structure = load_checkpoint(runner.last_checkpoint, "checkpoint")[0], run["checkpoint"]
    assert sorted(saved) == structure["top"]
    assert saved["epoch"] == structure["epoch"] and saved["scaler"] is structure["scaler"]
    for name, tensor in saved["model"].items():
        assert structure["model"][name] == {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
        }
    for group, expected in zip(
        saved["optimizer"]["param_groups"], structure["optimizer"]["param_groups"], strict=True
    ):
        assert group["params"] == expected["params"]
        assert group["lr"] == pytest.approx(expected["lr"], abs=LR)
    for index, state in structure["optimizer"]["state"].items():
        assert {
            key: list(value.shape) for key, value in saved["optimizer"]["state"][int(index)].items()
        } == {key: value["shape"] for key, value in state.items()}


def test_a_checkpoint_with_the_buffers_of_2023_resumes(model_files, tmp_path):
    """Cut after the first epoch, written with the extra buffers and no newer options: the end is the same."""
    run = RUNS["runs"][0]
    expected = np.load(SET / f"run_{run['name']}.npz")
    whole = build(configuration(run, model_files, tmp_path), expected)
    whole.train(cycle(golden_batches()))
    saved = load_checkpoint(whole.output_dir / "checkpoint_0.pth", "checkpoint")[0]
    for name, entry in run["checkpoint"]["model"].items():
        saved["model"].setdefault(
            name, torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        )
    known = run["checkpoint"]["optimizer"]["param_groups"][0]
    saved["optimizer"]["param_groups"] = [
        {key: value for key, value in group.items() if key in known}
        for group in saved["optimizer"]["param_groups"]
    ]
    torch.save(saved, tmp_path / "of_2023.pth")
    cfg = configuration(
        run, model_files, tmp_path, **{"run.resume_ckpt_path": tmp_path / "of_2023.pth"}
    )
    rest, batches = build(cfg, expected), cycle(golden_batches())
    for _ in range(run["iters_per_epoch"]):
        next(batches)
    rest.train(batches)
    assert torch.equal(rest.model.llama_proj.weight, whole.model.llama_proj.weight)
    assert largest(rest.model.llama_proj.weight.detach(), expected["final_weight"]) <= WEIGHTS


def test_the_plan_knows_the_parts_without_loading_weights(model_files, tmp_path, capsys):
    run = RUNS["runs"][0]
    cfg = configuration(run, model_files, tmp_path)
    before = list(tmp_path.iterdir())
    assert registry.get_runner_class("runner_base").print_plan(cfg) == 0
    plan = capsys.readouterr().out
    trainable = (
        int(np.prod(run["checkpoint"]["model"]["llama_proj.weight"]["shape"]))
        + (run["checkpoint"]["model"]["llama_proj.bias"]["shape"][0])
    )
    assert "=====  Running Parameters    =====" in plan and '"accum_reduction": "sum"' in plan
    assert re.search(rf"^llama_proj +{trainable:,} +{trainable:,}  float32  cpu$", plan, flags=re.M)
    assert re.search(r"^visual_encoder +[\d,]+ +0  float32  cpu$", plan, flags=re.M)
    assert (
        f"training: {trainable:,} parameters, {run['max_epoch']} epochs of {run['iters_per_epoch']} steps, "
        in plan
    )
    assert list(tmp_path.iterdir()) == before
