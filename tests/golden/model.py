"""The small model of golden set c, built through the configuration as any other."""

import json
import shutil

from omegaconf import OmegaConf

from minigpt4.models import MiniGPT4
from tests.golden import GOLDEN

FOLDER = GOLDEN / "c_minigpt4"
CONFIG = json.loads((FOLDER / "config.json").read_text())


def vit_fields(vit):
    """Return the EvaVitConfig fields of a fixture's description of a ViT."""
    return {
        "embed_dim": vit["embed_dim"],
        "depth": vit["depth"],
        "num_heads": vit["num_heads"],
        "mlp_dim": vit["mlp_hidden"],
        "patch_size": vit["patch_size"],
    }


def qformer_fields(qformer):
    """Return the QFormerConfig fields of a fixture's description of a Q-Former."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return {name: qformer["bert_config"][name] for name in names} | {
        "cross_attention_frequency": qformer["cross_attention_freq"],
        "encoder_width": qformer["encoder_width"],
    }


def write_vision_files(folder):
    """Write the set's ViT and BLIP-2 files with their sidecars into `folder`; return their paths."""
    vit, blip2 = folder / "eva_vit.safetensors", folder / "blip2.safetensors"
    for path in (vit, blip2):
        shutil.copy(FOLDER / "model" / path.name, path)
    vit.with_suffix(".json").write_text(json.dumps(vit_fields(CONFIG["vit"])))
    blip2.with_suffix(".json").write_text(json.dumps(qformer_fields(CONFIG["qformer"])))
    return vit, blip2


def golden_config(folder, **changes):
    """Return the `model` section of golden set c (weights copied into `folder`), with `changes`."""
    vit, blip2 = write_vision_files(folder)
    section = {
        "vit_ckpt": str(vit),
        "q_former_model": str(blip2),
        "ckpt": str(FOLDER / "model/minigpt4_ckpt.safetensors"),
        "llama_model": str(FOLDER / "model/llama"),
        "image_size": CONFIG["image_size"],
        "num_query_token": CONFIG["num_query_token"],
        "vit_precision": "fp32",
        "llm_precision": "fp32",
        "check_llm": False,  # random weights
        **changes,
    }
    return OmegaConf.merge(OmegaConf.structured(MiniGPT4.Config), section)


def golden_model(folder, **changes):
    """Return the model of golden set c in float32 on the CPU."""
    return MiniGPT4.from_config(golden_config(folder, **changes), device="cpu")
