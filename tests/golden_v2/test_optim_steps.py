"""Optimisation steps of the real model, task and runner equal those of the newest release (sets a, b: runs.json).

Among them steps without an image, in which AdamW leaves the projection alone: neither decay nor moments.
"""

import dataclasses
import json
from argparse import Namespace
from itertools import cycle

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from minigpt4.common.checkpoint import load_checkpoint
from minigpt4.common.config import Config
from minigpt4.common.registry import registry
from minigpt4.runners.run_config import RunConfig
from minigpt4.tasks import setup_task
from tests.golden_v2 import GOLDEN, read
from tests.golden_v2.model import CONFIGS, FOLDERS, golden_config

RUN_KEYS = [field.name for field in dataclasses.fields(RunConfig)]
# The fixtures' README: measured between torch versions 4.1e-6, 5.7e-6, 1.3e-5 and 3.7e-7.
WEIGHTS, LOSS, MOMENT, SQUARE, LR = 3e-5, 3e-5, 5e-5, 2e-6, 1e-15
RUNS = []
for which in FOLDERS:
    for run in read(f"{which}/runs.json", {"runs": ()})["runs"]:
        RUNS.append(pytest.param(which, run, id=f"{which}-{run['name']}"))


def golden_batches(which):
    images, runs = np.load(GOLDEN / which / "batches.npz"), read(f"{which}/runs.json")
    batches = []
    for number, batch in enumerate(runs["batches"]):
        batches.append({key: value for key, value in batch.items() if key != "image"})
        if f"image_{number}" in images:
            batches[-1]["image"] = torch.from_numpy(images[f"image_{number}"])
    return batches


def settings_of_one_prompt(which):
    """Return the settings of the forward case with one prompt: a run without settings of its own has them."""
    cases = read(f"{which}/forward_cases.json")
    return next((case["settings"] for case in cases if "one_prompt" in case["name"]), {})


def build(which, run, folder, initial):
    """Return the runner around the model at the golden start, through the configuration that train.py checks."""
    settings = read(f"{which}/runs.json").get("settings") or settings_of_one_prompt(which)
    model_cfg = golden_config(which, folder, **settings)
    section = {
        key: value
        for key, value in OmegaConf.to_container(model_cfg).items()
        if value not in (None, "")
    }
    options = {f"run.{key}": value for key, value in run["run"].items() if key in RUN_KEYS}
    options |= {
        "run.task": "image_text_pretrain",
        "run.lr_sched": "linear_warmup_cosine_lr",
        "run.accum_reduction": "sum",
        "run.weight_decay": max(group["weight_decay"] for group in run["groups"]),
        "run.num_workers": 0,
        "run.device": "cpu",
        "run.output_dir": folder,
    }
    (folder / "model.yaml").write_text(json.dumps({"model": section, "run": {}}))
    cfg = Config(
        Namespace(
            cfg_path=str(folder / "model.yaml"),
            options=[f"{key}={options[key]}" for key in options],
        )
    )
    task = setup_task(cfg)
    model = task.build_model(cfg)
    for part in model.llama_model.modules():  # the fixtures were made without it
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    model.prompt_list = CONFIGS[which].get("one_prompt", [])
    model.load_trainable(parameters(initial, "init"), "the fixture")
    return registry.get_runner_class(cfg.run_cfg.runner)(
        cfg=cfg, task=task, model=model, datasets={}
    )


def parameters(arrays, kind):
    """Return {name: tensor} of one kind of a run's arrays."""
    names = [name for name in arrays if name.startswith(f"{kind}__")]
    return {name.removeprefix(f"{kind}__"): torch.from_numpy(arrays[name]) for name in names}


def largest(found, expected):
    return np.abs(np.asarray(found, dtype=np.float64) - np.asarray(expected)).max()


@pytest.mark.parametrize(("which", "run"), RUNS)
def test_steps(which, run, tmp_path):
    golden = np.load(GOLDEN / which / f"run_{run['name']}.npz")
    runner = build(which, run, tmp_path, golden)
    own = runner.model._release_parameters()
    names = {id(parameter): name for name, parameter in own.items()}
    for group, expected in zip(runner.optimizer.param_groups, run["groups"], strict=True):
        assert [names[id(parameter)] for parameter in group["params"]] == expected["params"]
        assert group["weight_decay"] == expected["weight_decay"]

    runner.train(cycle(golden_batches(which)))
    steps = [
        json.loads(line) for line in (runner.output_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert largest([step["lr"] for step in steps], run["lr"]) <= LR
    assert largest([step["loss"] for step in steps], run["loss"]) <= LOSS
    for kind, limit in (("final", WEIGHTS), ("exp_avg", MOMENT), ("exp_avg_sq", SQUARE)):
        for name, expected in parameters(golden, kind).items():
            found = (
                own[name].detach() if kind == "final" else runner.optimizer.state[own[name]][kind]
            )
            assert largest(found, expected) <= limit, (kind, name)
    taken = {
        name: int(runner.optimizer.state[own[name]]["step"]) for name in run["adam_steps_taken"]
    }
    assert taken == run["adam_steps_taken"]

    saved = load_checkpoint(runner.last_checkpoint, "checkpoint")[0]
    constants = {name for name in run["saved_model_keys"] if name.endswith("inv_freq")}
    assert set(saved["model"]) == set(run["saved_model_keys"]) - constants
    assert set(run["saved_top_level"]) <= set(saved)
