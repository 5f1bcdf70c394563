"""Small files of the real layout: what a user of the 2023 release has on disk, at toy size.

Names, key layouts, excess tensors and root keys are those of the released files; widths are those of the golden set c.
The sidecar JSON beside a weight file is all that says it is small.
"""

import io
import json
import os
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.golden import GOLDEN

NUM_QUERY_TOKEN = 32  # as in minigpt4/configs/models/minigpt4.yaml; the golden model has fewer


@dataclass
class SmallRelease:
    """Where everything lies; `env` is what a program needs in its environment to find the hub files."""

    root: Path

    @property
    def env(self):
        return {**os.environ, "TORCH_HOME": str(self.root / "torch"), "OMP_NUM_THREADS": "1"}

    @property
    def hub(self):
        return self.root / "torch" / "hub" / "checkpoints"

    @property
    def llama(self):
        return self.root / "vicuna"

    @property
    def checkpoint(self):
        return self.root / "prerained_minigpt4_7b.pth"

    def options(self, **more):
        """Return `--options` that change only paths and the device."""
        paths = {
            "model.llama_model": self.llama,
            "run.device": "cpu",
            "run.output_dir": self.root / "output",
            **more,
        }
        return ["--options", *(f"{key}={value}" for key, value in paths.items())]


def write_small_release(root):
    """Write vision files, LLM folder, MiniGPT-4 checkpoint and the three datasets below `root`."""
    release = SmallRelease(Path(root))
    release.hub.mkdir(parents=True)
    dims = json.loads((GOLDEN / "c_minigpt4/config.json").read_text())
    _write_vision(release, dims)
    _write_llama(release)
    width = json.loads((release.llama / "config.json").read_text())["hidden_size"]
    write_checkpoint(release.checkpoint, dims["qformer"]["bert_config"]["hidden_size"], width)
    for name, first in (("laion_dataset", 0), ("cc_sbu_dataset", 50)):
        (release.root / name).mkdir()
        for shard in range(2):
            write_shard(
                release.root / name / f"{shard:05d}.tar",
                range(first + 10 * shard, first + 10 * shard + 10),
            )
    write_align_folder(release.root / "cc_sbu_align", 6)
    return release


def write_checkpoint(path, hidden, width, **changes):
    """Write a MiniGPT-4 checkpoint of the 2023 saver: trainables and the buffers it kept, five root keys."""
    generator = torch.Generator().manual_seed(3)
    model = {
        "llama_proj.weight": torch.randn(width, hidden, generator=generator) * 0.05,
        "llama_proj.bias": torch.zeros(width),
        "Qformer.bert.embeddings.position_ids": torch.arange(24)[None],
        "llama_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    torch.save(
        {"model": {**model, **changes}, "optimizer": {}, "config": {}, "scaler": None, "epoch": 3},
        path,
    )


def _write_vision(release, dims):
    vit = load_file(GOLDEN / "c_minigpt4/model/eva_vit.safetensors")
    width, depth = dims["vit"]["embed_dim"], dims["vit"]["depth"]
    excess = {
        name.replace("blocks.0.", f"blocks.{depth}."): t
        for name, t in vit.items()
        if name.startswith("blocks.0.")
    }
    excess |= {
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
        "head.weight": torch.ones(7, width),
    }
    excess["head.bias"] = torch.zeros(7)
    torch.save(
        {name: tensor.half() for name, tensor in {**vit, **excess}.items()},
        release.hub / "eva_vit_g.pth",
    )
    _write_sidecar(
        release.hub / "eva_vit_g.json",
        embed_dim=width,
        depth=depth,
        num_heads=dims["vit"]["num_heads"],
        mlp_dim=dims["vit"]["mlp_hidden"],
        patch_size=dims["vit"]["patch_size"],
    )
    blip2 = load_file(GOLDEN / "c_minigpt4/model/blip2.safetensors")
    repeats = -(-NUM_QUERY_TOKEN // blip2["query_tokens"].shape[1])
    blip2["query_tokens"] = blip2["query_tokens"].repeat(1, repeats, 1)[:, :NUM_QUERY_TOKEN].clone()
    torch.save({"model": blip2}, release.hub / "blip2_pretrained_flant5xxl.pth")
    bert = dims["qformer"]["bert_config"]
    _write_sidecar(
        release.hub / "blip2_pretrained_flant5xxl.json",
        hidden_size=bert["hidden_size"],
        num_hidden_layers=bert["num_hidden_layers"],
        num_attention_heads=bert["num_attention_heads"],
        intermediate_size=bert["intermediate_size"],
        cross_attention_frequency=dims["qformer"]["cross_attention_freq"],
        encoder_width=dims["qformer"]["encoder_width"],
    )


def _write_sidecar(path, **dims):
    path.write_text(json.dumps(dims))


def _write_llama(release):
    """Copy the golden LLM and teach it some English, so that it passes the check at start as Vicuna does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(GOLDEN / "c_minigpt4/model/llama", release.llama)
    llm = AutoModelForCausalLM.from_pretrained(release.llama, dtype=torch.float32)
    teach_english(llm, AutoTokenizer.from_pretrained(release.llama), 3e-3, release.llama)


def teach_english(llm, tokenizer, lr, folder):
    """Train an LLM on the text of the check at start, so that it passes it, and save its weights in `folder`."""
    from minigpt4.models.llm.language_model import SANITY_TEXT

    ids = tokenizer(SANITY_TEXT, return_tensors="pt").input_ids
    optimizer = torch.optim.Adam(llm.parameters(), lr=lr)
    for _ in range(60):
        optimizer.zero_grad()
        llm(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    save_file(
        {name: tensor.contiguous() for name, tensor in llm.state_dict().items()},
        folder / "model.safetensors",
    )


def picture(seed, size=(64, 48)):
    """Return a random image, the same for the same seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def jpeg_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_tar(path, members):
    """Write a tar of (name, bytes) members."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_shard(path, indices):
    """Write a shard as img2dataset does: <9-digit key>.jpg, .txt and .json for every index."""
    members = []
    for index in indices:
        caption, key = f"An image, number {index}!", f"{index:09d}"
        record = {
            "caption": caption,
            "url": f"http://example.org/{index}.jpg",
            "key": key,
            "status": "success",
        }
        members += [
            (f"{key}.jpg", jpeg_bytes(picture(index))),
            (f"{key}.txt", caption.encode()),
            (f"{key}.json", json.dumps(record).encode()),
        ]
    write_tar(path, members)


def write_align_folder(folder, count):
    """Write a second-stage dataset: filter_cap.json and image/<id>.jpg."""
    (folder / "image").mkdir(parents=True)
    for index in range(count):
        picture(100 + index).save(folder / "image" / f"{index}.jpg")
    annotations = [
        {
            "image_id": str(index),
            "caption": f"The image shows pattern number {index}. It is colourful.",
        }
        for index in range(count)
    ]
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))
