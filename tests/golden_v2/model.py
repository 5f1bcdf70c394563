"""The small models of the set, built through the configuration as any other; dimensions are read off its files."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file

import minigpt4
from minigpt4.common.registry import registry
from tests.golden_v2 import GOLDEN, read

PACKAGE = Path(minigpt4.__file__).parent
FOLDERS = sorted(path.parent.name for path in GOLDEN.glob("*/forward_cases.json"))
CONFIGS = {
    path.parent.name: read(f"{path.parent.name}/config.json")
    for path in GOLDEN.glob("*/config.json")
}
DIMS = next((config for config in CONFIGS.values() if "vit" in config), {})
V2, LLAMA2 = "minigpt_v2", "minigpt4_llama2"  # what the sets d and e call their models


def folder_of(name):
    """Return the folder of the set with the model that its sets d and e call `name`; skip the test if it has none."""
    for which, config in CONFIGS.items():
        if name in (which, config["arch"], f"{config['arch']}_{config.get('llama')}"):
            return which
    pytest.skip(f"this set of fixtures has no model {name}")


def checkpoint_of(name):
    """Return the set's checkpoint for a model: with LoRA, if the model has it, or without."""
    has_lora = "lora_r" in CONFIGS[folder_of(name)]
    for path in sorted((GOLDEN / "model").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        if "llama_proj.weight" in names and any(".lora_" in each for each in names) == has_lora:
            return path
    pytest.skip(f"this set of fixtures has no checkpoint of {name}")


def write_vit(folder):
    """Copy the set's ViT with its sidecar into `folder`; return its path."""
    if not DIMS:
        pytest.skip("this set of fixtures has no config.json with the dimensions of its ViT")
    path = folder / "eva_vit.safetensors"
    shutil.copy(GOLDEN / "model" / path.name, path)
    tensors = load_file(path)
    width, _, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    dims = {
        "embed_dim": width,
        "depth": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "num_heads": DIMS["vit"]["num_heads"],
        "mlp_dim": len(tensors["blocks.0.mlp.fc1.bias"]),
        "patch_size": patch_size,
        "image_size": patch_size * round((tensors["pos_embed"].shape[1] - 1) ** 0.5),
    }
    path.with_suffix(".json").write_text(json.dumps(dims))
    return path


def llm_folder(name, folder):
    """Return the folder of the LLM that a config.json calls `name`; another configuration has the same weights."""
    if name != "llama" and (GOLDEN / "model" / f"{name}_config").is_dir():
        shutil.copytree(GOLDEN / "model/llama", folder / name)
        shutil.copy(GOLDEN / "model" / f"{name}_config" / "config.json", folder / name)
        return folder / name
    return GOLDEN / "model/llama"


def golden_config(which, folder, **changes):
    """Return the `model` section of a folder or model of the set (the ViT copied into `folder`), with `changes`."""
    config = CONFIGS[folder_of(which)]
    model_class = registry.get_model_class(config["arch"])
    defaults = (
        PACKAGE / model_class.PRETRAINED_MODEL_CONFIG_DICT[config.get("model_type", "pretrain")]
    )
    section = {
        "arch": config["arch"],
        "vit_ckpt": str(write_vit(folder)),
        "image_size": config.get("image_size", DIMS["image_size"]),
        "llama_model": str(llm_folder(config.get("llama", "llama"), folder)),
        "ckpt": str(checkpoint_of(which)),
        "vit_precision": "fp32",
        "llm_precision": "fp32",
        "check_llm": False,  # random weights
        **{
            key: config[key] for key in ("lora_r", "lora_alpha", "prompt_template") if key in config
        },
        **changes,
    }
    return OmegaConf.merge(
        OmegaConf.structured(model_class.Config), OmegaConf.load(defaults).model, section
    )


def golden_model(which, folder, **changes):
    """Return the model of a folder or model of the set in float32 on the CPU."""
    cfg = golden_config(which, folder, **changes)
    return registry.get_model_class(cfg.arch).from_config(cfg, device="cpu")


def prompt_of(case, config, num_cond):
    """Return the prompt that a case was given, "" for none; `num_cond`: how many tokens its prompts have at most."""
    if "python_random_seed" in case:
        return random.Random(case["python_random_seed"]).choice(config["prompt_list"])
    has_none = "instruction_input" in case["samples"] or num_cond <= DIMS["tokens_per_image"]
    return "" if has_none else config.get("one_prompt", [""])[0]


def set_up(model, case, config, num_cond):
    """Give the model a case's settings and prompt; return the case's samples."""
    for key, value in case["settings"].items():
        setattr(model, key, value)
    prompt = prompt_of(case, config, num_cond)
    model.prompt_list = [prompt] if prompt else []
    return dict(case["samples"])


def with_images(samples, which, case):
    """Return `samples` with the images of the case, if it has any."""
    if not case.get("image_key"):
        return samples
    return samples | {
        "image": torch.from_numpy(np.load(GOLDEN / which / "images.npz")[case["image_key"]])
    }
