"""Files of random weights and images, laid out as the 2023 release, so that train.py itself can be measured."""

import tempfile
from pathlib import Path

from benchmarks import data, workload

CONFIG = "train_configs/minigpt4_stage1_pretrain.yaml"
FOLDER = Path(tempfile.gettempdir()) / "minigpt4-benchmarks"
PICTURES = 128
FILES = {"vit": ("visual_encoder.",), "q": ("Qformer.", "ln_vision.", "query_tokens"), "model": ("llama_model.",)}


def options(size):
    """Return the `--options` with which CONFIG trains a model of `size`; its files are written at the first call."""
    folder = FOLDER / size
    folder.mkdir(parents=True, exist_ok=True)
    cfg = workload.model_config(size, folder)
    shards = folder / "data"
    if not shards.is_dir():
        write_weights(cfg, folder)
        data.write_shards(shards, "256x256", PICTURES)
    keys = ("vit_ckpt", "q_former_model", "llama_model", "image_size", "num_query_token")
    found = [f"model.{key}={cfg[key]}" for key in keys] + ["model.check_llm=False", "run.device=auto"]
    for name in ("laion", "cc_sbu"):
        found.append(f"datasets.{name}.build_info.storage={shards}/{{00000..{data.SHARDS - 1:05d}}}.tar")
        found.append(f"datasets.{name}.vis_processor.train.image_size={cfg.image_size}")
    return found


def write_weights(cfg, folder):
    """Write ViT, Q-Former and LLM of a `model` section as .safetensors in half precision, and a tokenizer."""
    import torch
    from safetensors.torch import save_file

    from minigpt4.models import MiniGPT4, memory
    from minigpt4.models.vision.qformer import to_release_name

    generator = torch.Generator().manual_seed(workload.SEED)
    state = MiniGPT4.skeleton(cfg, torch.float16).state_dict()
    for stem, prefixes in FILES.items():
        path = folder / f"{stem}.safetensors"
        print(f"writing {path}", flush=True)
        tensors = {}
        for name, tensor in state.items():
            if name.startswith(prefixes):
                is_norm = tensor.ndim == 1 and name.endswith("weight")
                values = torch.ones(tensor.shape) if is_norm else torch.randn(tensor.shape, generator=generator) * 0.02
                own = to_release_name(name) if stem == "q" else name.removeprefix(prefixes[0])
                tensors[own] = values.half()
        save_file(tensors, path, metadata={"format": "pt"})
    memory.tokenizer_of_characters().save_pretrained(folder)
