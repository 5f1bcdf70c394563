"""Both schedules give the lr of every step of the 2023 release (golden set e), to 1e-15."""

import json

import numpy as np
import pytest
from omegaconf import OmegaConf

from minigpt4.common.registry import registry
from minigpt4.runners.run_config import RunConfig
from tests.golden import GOLDEN

CONFIGS = json.loads((GOLDEN / "e_lr" / "configs.json").read_text())
STEP, COSINE = "linear_warmup_step_lr", "linear_warmup_cosine_lr"


def schedule(name, config):
    run_cfg = OmegaConf.structured(RunConfig)
    run_cfg.warmup_lr = float(config["warmup_start_lr"])
    run_cfg.lr_decay_rate = config.get("decay_rate")
    for key in ("init_lr", "min_lr", "warmup_steps", "max_epoch"):
        run_cfg[key] = config[key]
    return registry.get_lr_scheduler_class(name)(None, run_cfg, config["iters_per_epoch"])


def assert_lrs(found_by, config, expected):
    iters, every = config["iters_per_epoch"], config.get("stored_every", 1)
    found = [found_by.lr(*divmod(t, iters)) for t in range(0, config["max_epoch"] * iters, every)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("case", CONFIGS[COSINE])
def test_cosine(case):
    config = CONFIGS[COSINE][case]
    assert_lrs(schedule(COSINE, config), config, np.load(GOLDEN / "e_lr" / "cosine.npz")[case])


def test_step():
    config = CONFIGS[STEP]
    assert_lrs(schedule(STEP, config), config, np.load(GOLDEN / "e_lr" / "step.npz")[STEP])
