"""The small models of the set, built through the configuration as any other; dimensions are read off its files."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import minigpt4
from minigpt4.common.registry import registry
from tests.golden_v2 import GOLDEN, read

PACKAGE = Path(minigpt4.__file__).parent
FOLDERS = sorted(path.parent.name for path in GOLDEN.glob("*/forward_cases.json"))
CONFIGS = {path.parent.name: read(f"{path.parent.name}/config.json") for path in GOLDEN.glob("*/config.json")}
DIMS = next((config for config in CONFIGS.values() if "vit" in config), {})
CHECKPOINTS = {"minigpt_v2": "minigpt_v2_ckpt.safetensors", "minigpt4": "minigpt4_noqf_ckpt.safetensors"}


def write_vit(folder):
    """Copy the set's ViT with its sidecar into `folder`; return its path."""
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
    """Return the `model` section of a folder of the set (the ViT copied into `folder`), with `changes`."""
    config = CONFIGS[which]
    model_class = registry.get_model_class(config["arch"])
    defaults = PACKAGE / model_class.PRETRAINED_MODEL_CONFIG_DICT[config.get("model_type", "pretrain")]
    section = {
        "arch": config["arch"],
        "vit_ckpt": str(write_vit(folder)),
        "llama_model": str(llm_folder(config.get("llama", "llama"), folder)),
        "ckpt": str(GOLDEN / "model" / CHECKPOINTS[config["arch"]]),
        "image_size": config.get("image_size", DIMS["image_size"]),
        "vit_precision": "fp32",
        "llm_precision": "fp32",
        "check_llm": False,  # random weights
        **{key: config[key] for key in ("lora_r", "lora_alpha", "prompt_template") if key in config},
        **changes,
    }
    return OmegaConf.merge(OmegaConf.structured(model_class.Config), OmegaConf.load(defaults).model, section)


def golden_model(which, folder, **changes):
    """Return the model of a folder of the set in float32 on the CPU."""
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
    return samples | {"image": torch.from_numpy(np.load(GOLDEN / which / "images.npz")[case["image_key"]])}
