"""Initialise the small MiniGPT-v2's `llama_proj`: it maps ViT vectors to the LLM's own embeddings of what they show.

The map is a least-squares solution, found in seconds without running the LLM: the vector of a strip that shows a red
circle becomes nearly the embedding of `red` plus that of `circle`, and each digit of its box a direction of its own. The
real MiniGPT-v2 does not start from nothing, either: its projection comes from an LLM and a ViT trained together.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from minigpt4.models.vision.eva_vit import EvaVit
from minigpt4.models.vision.merging import join_patches
from minigpt4.quickstart import world
from minigpt4.quickstart.drawn_images import NOTHING
from minigpt4.quickstart.pretrain_boxes import LABELS, batch
from minigpt4.quickstart.pretrain_vision import normalise
from minigpt4.quickstart.vision import VOCABULARY

NUM_IMAGES = 800  # half of them crowded
PART = 50  # images in a batch of the ViT
RIDGE = 10.0  # weight of the regularisation
# The weight of each kind of label in the target of a vector. Shapes and colours weigh most: questions name objects by them.
WEIGHTS = {"shape": 1.0, "colour": 1.0, "size": 0.3, "cell": 0.3, "background": 0.3, "count": 0.0}
DIGITS = {"tens": 0.5, "units": 0.35}  # of a box corner
OBJECT = 0.5  # of whether there is an object at all


def write_start(vit_path: Path, llm: Path, path: Path) -> Path:
    """Write a checkpoint that holds `llama_proj` alone to `path`, if absent; return `path`."""
    if path.is_file():
        return path
    vectors, labels = look(vit_path, 0, NUM_IMAGES)
    weight = solve(vectors, targets(labels, llm))
    state = {"llama_proj.weight": weight[:-1].T.contiguous(), "llama_proj.bias": weight[-1].clone()}
    scratch = path.with_suffix(".part")
    torch.save({"model": state}, scratch)
    scratch.rename(path)
    return path


@torch.no_grad()
def look(vit_path: Path, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the vectors [N, H] of all strips of `count` images, and their labels [N, len(LABELS)]."""
    config = EvaVit(**json.loads(vit_path.with_suffix(".json").read_text()))
    vit = config.build(world.IMAGE_SIZE, device="cpu")
    config.load(vit, vit_path, "model.vit_ckpt")
    vit = vit.float().eval()
    vectors, labels = [], []
    for number in range(first, first + count, PART):
        images, found = batch("pretrain", number, PART, config.patch_size)
        tokens = F.layer_norm(vit(normalise(images, "cpu")), (config.width,))
        vectors.append(join_patches(tokens, 1, "merged").flatten(0, 1))
        labels.append(found.flatten(0, 1))
    return torch.cat(vectors), torch.cat(labels)


def targets(labels: torch.Tensor, llm: Path) -> torch.Tensor:
    """Return what vectors with these labels [N, len(LABELS)] should become: weighted sums [N, D] of a code per label."""
    word_codes = {name: codes_of(name, llm) for name, weight in WEIGHTS.items() if weight}
    width, generator = word_codes["shape"].shape[1], torch.Generator().manual_seed(0)
    scale = word_codes["shape"].square().mean().sqrt()
    result = torch.zeros(len(labels), width)
    for column, (name, size) in enumerate(LABELS.items()):
        weight = WEIGHTS.get(name, DIGITS.get(name.rpartition(" ")[2], OBJECT))
        if not weight:
            continue
        codes = word_codes.get(name)
        if codes is None:  # no word says which side of a box a digit belongs to
            codes = scale * torch.randn(size, width, generator=generator)
        elif weight < WEIGHTS["shape"]:
            codes = codes - codes.mean(0)  # the mean would be in every vector
        has_label = labels[:, column] != NOTHING
        result[has_label] += weight * codes[labels[has_label, column]]
    return result


def codes_of(name: str, llm: Path) -> torch.Tensor:
    """Return the LLM's embeddings [answers, D] of the words for a label's answers, averaged over a word's tokens."""
    embedding, tokenizer = _embedding(llm)
    words = VOCABULARY[name]
    ids = [tokenizer(f" {word}", add_special_tokens=False).input_ids for word in words]
    return torch.stack([embedding[row].mean(0) for row in ids])


def solve(vectors: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the ridge regression [H + 1, D] of `wanted` [N, D] on `vectors` [N, H]; its last row is the bias."""
    inputs = F.pad(vectors, (0, 1), value=1.0).double()
    square = inputs.T @ inputs + RIDGE * torch.eye(inputs.shape[1], dtype=torch.float64)
    return torch.linalg.solve(square, inputs.T @ wanted.double()).float()


@lru_cache(1)
def _embedding(llm: Path) -> tuple[torch.Tensor, Any]:
    """Return the input embeddings [V, D] of the LLM in a folder, in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    return model.get_input_embeddings().weight.detach(), AutoTokenizer.from_pretrained(llm)
