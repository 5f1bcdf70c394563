"""A start for the small MiniGPT-v2's `llama_proj`: vectors of the ViT onto the LLM's own embeddings of what they show.

A least-squares map, found in seconds without running the LLM: the vector of a strip that shows a red circle becomes
nearly the embedding of `red` plus that of `circle`, and of its box each digit becomes a direction of its own. The real
MiniGPT-v2 does not start from nothing, either: its projection comes from an LLM and a ViT that were trained together.
"""

import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from minigpt4.models.vision.eva_vit import EvaVit
from minigpt4.models.vision.merging import join_patches
from minigpt4.quickstart import world
from minigpt4.quickstart.drawn_images import NOTHING
from minigpt4.quickstart.pretrain_boxes import LABELS, batch
from minigpt4.quickstart.pretrain_vision import normalise
from minigpt4.quickstart.vision import VOCABULARY

NUM_IMAGES = 800  # half of them crowded
RIDGE = 10.0
# How much of a vector each kind of label is. Names count most: questions ask by them.
WEIGHTS = {"shape": 1.0, "colour": 1.0, "size": 0.3, "cell": 0.3, "background": 0.3, "count": 0.0}
DIGITS = {"tens": 0.5, "units": 0.35}
OBJECT = 0.5  # whether there is an object at all


def write_start(vit_path: Path, llm: Path, path: Path) -> Path:
    """Return `path`, a checkpoint with `llama_proj` alone, written if absent."""
    if path.is_file():
        return path
    vectors, labels = look(vit_path)
    weight = solve(vectors, targets(labels, llm))
    state = {"llama_proj.weight": weight[:-1].T.contiguous(), "llama_proj.bias": weight[-1].clone()}
    scratch = path.with_suffix(".part")
    torch.save({"model": state}, scratch)
    scratch.rename(path)
    return path


@torch.no_grad()
def look(vit_path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (vectors [N, H] of the images' strips, their labels [N, len(LABELS)])."""
    config = EvaVit(**json.loads(vit_path.with_suffix(".json").read_text()))
    vit = config.build(world.IMAGE_SIZE, device="cpu")
    config.load(vit, vit_path, "model.vit_ckpt")
    vit, vectors, labels = vit.float().eval(), [], []
    for first in range(0, NUM_IMAGES, 50):
        images, found = batch("pretrain", first, 50, config.patch_size)
        tokens = F.layer_norm(vit(normalise(images, "cpu")), (config.width,))
        vectors.append(join_patches(tokens, 1, "merged").flatten(0, 1))
        labels.append(found.flatten(0, 1))
    return torch.cat(vectors), torch.cat(labels)


def targets(labels: torch.Tensor, llm: Path) -> torch.Tensor:
    """Return what vectors with these labels [N, len(LABELS)] should become, [N, D]: sums of the LLM's embeddings."""
    embedding, tokenizer = _embedding(llm)
    draw = torch.Generator().manual_seed(0)
    scale = embedding.square().mean().sqrt()
    result = torch.zeros(len(labels), embedding.shape[1])
    for column, (name, size) in enumerate(LABELS.items()):
        if name in WEIGHTS:
            words = VOCABULARY[name]
            codes = torch.stack([_of_word(str(word), embedding, tokenizer) for word in words])
            weight = WEIGHTS[name]
            if weight < 1.0:  # of what every strip says, only the differences
                codes = codes - codes.mean(0)
        else:
            # no word says which side of a box a digit belongs to
            codes = torch.randn(size, embedding.shape[1], generator=draw) * scale
            weight = DIGITS.get(name.rpartition(" ")[2], OBJECT)
        has_one = labels[:, column] != NOTHING
        result[has_one] += weight * codes[labels[has_one, column]]
    return result


def solve(vectors: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the ridge regression [H + 1, D] of `wanted` [N, D] on `vectors` [N, H]; its last row is the bias."""
    inputs = F.pad(vectors, (0, 1), value=1.0).double()
    square = inputs.T @ inputs + RIDGE * torch.eye(inputs.shape[1], dtype=torch.float64)
    return torch.linalg.solve(square, inputs.T @ wanted.double()).float()


def _embedding(llm: Path) -> tuple[torch.Tensor, nn.Module]:
    """Return (the input embeddings [V, D] of an LLM's folder in float32, its tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
    return model.get_input_embeddings().weight.detach(), AutoTokenizer.from_pretrained(llm)


def _of_word(word: str, embedding: torch.Tensor, tokenizer: nn.Module) -> torch.Tensor:
    """Return the mean embedding [D] of a word's tokens, as it stands within a sentence."""
    ids = tokenizer(f" {word}", add_special_tokens=False).input_ids
    return embedding[ids].mean(0)
