"""Files of random weights and images in the layout of the 2023 release, so that train.py itself can be measured."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from omegaconf import DictConfig
from safetensors.torch import save_file

from benchmarks import workload
from minigpt4.models import MiniGPT4, memory
from minigpt4.models.vision.qformer import to_release_name

CONFIG = "train_configs/minigpt4_stage1_pretrain.yaml"
FOLDER = Path(tempfile.gettempdir()) / "minigpt4-benchmarks"
NUM_IMAGES = 128
FILES = {  # {stem of the file: prefixes of the parameters in it}
    "vit": ("visual_encoder.",),
    "q": ("Qformer.", "ln_vision.", "query_tokens"),
    "model": ("llama_model.",),
}


def options(size: str) -> list[str]:
    """Return the `--options` with which CONFIG trains a model of `size`; the first call writes its files."""
    from benchmarks import data  # the datasets take seconds to import

    folder = FOLDER / size
    folder.mkdir(parents=True, exist_ok=True)
    cfg = workload.model_config(size, folder)
    shards = folder / "data"
    if not shards.is_dir():
        write_weights(cfg, folder)
        data.write_shards(shards, "256x256", NUM_IMAGES)
    keys = ("vit_ckpt", "q_former_model", "llama_model", "image_size", "num_query_token")
    settings = [f"model.{key}={cfg[key]}" for key in keys] + [
        "model.check_llm=False",
        "run.device=auto",
    ]
    for name in ("laion", "cc_sbu"):
        settings.append(
            f"datasets.{name}.build_info.storage={shards}/{{00000..{data.SHARDS - 1:05d}}}.tar"
        )
        settings.append(f"datasets.{name}.vis_processor.train.image_size={cfg.image_size}")
    return settings


def write_weights(cfg: DictConfig, folder: Path, stems: Iterable[str] = FILES) -> None:
    """Write ViT, Q-Former and LLM of a `model` section as .safetensors in half precision, and a tokenizer."""
    # a GPU draws the weights in seconds, not minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(workload.SEED)
    state = MiniGPT4.skeleton(cfg, torch.float16).state_dict()
    for stem in stems:
        path, prefixes = folder / f"{stem}.safetensors", FILES[stem]
        tensors = {}
        print(f"writing {path}", flush=True)
        for name, tensor in state.items():
            if not name.startswith(prefixes):
                continue
            is_norm = tensor.ndim == 1 and name.endswith("weight")
            if is_norm:
                values = torch.ones(tensor.shape)
            else:
                values = 0.02 * torch.randn(tensor.shape, generator=generator, device=device)
            key = to_release_name(name) if stem == "q" else name.removeprefix(prefixes[0])
            tensors[key] = values.half().cpu()
        save_file(tensors, path, metadata={"format": "pt"})
    memory.tokenizer_of_characters().save_pretrained(folder)
