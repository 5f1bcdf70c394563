"""Teach the quickstart's small EVA ViT where objects are: it becomes the vision encoder of the small MiniGPT-v2.

    python -m minigpt4.quickstart.pretrain_boxes [--steps N] [--output FOLDER]

Training starts from the committed ViT, used as in MiniGPT-v2: without a Q-Former, four neighbouring patches merged into
one vector. Each vector learns to tell what the object is that covers most of its strip of the image, the object's box,
digit by digit, and the background and number of objects of the whole image. The heads are linear, so that a linear
`llama_proj` can read all this, and are dropped at the end. No text and no LLM is involved. Writes
`eva_vit_boxes.safetensors`, its dimensions beside it, and manifest_boxes.json with the accuracies on held-out images.
"""

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from tqdm import trange

from minigpt4.common.utils import file_sha256
from minigpt4.models.vision.merging import NUM_MERGED, join_patches
from minigpt4.quickstart import world
from minigpt4.quickstart.drawn_images import NOTHING
from minigpt4.quickstart.pretrain_vision import normalise
from minigpt4.quickstart.vision import VOCABULARY, Vision

WEIGHTS = Path(__file__).parent / "weights"
OBJECT_KINDS = ("shape", "colour", "size", "cell")
CORNERS = ("left", "top", "right", "bottom")
# {what a vector learns to tell: number of classes}. Coordinates are in hundredths of the image, told by digit.
LABELS = {"object": 2, "background": len(world.BACKGROUNDS), "count": world.MAX_OBJECTS}
LABELS |= {kind: len(VOCABULARY[kind]) for kind in OBJECT_KINDS}
LABELS |= {f"{corner} tens": 11 for corner in CORNERS}
LABELS |= {f"{corner} units": 10 for corner in CORNERS}
MIN_COVER = 0.05  # share of a strip that its object has to cover
CHECK_EVERY = 100  # steps


def strip_labels(scene: world.Scene, object_map: np.ndarray, patch_size: int) -> np.ndarray:
    """Return the labels [V, len(LABELS)] of an image's V vectors, NOTHING where one does not apply."""
    size, width = object_map.shape[0], NUM_MERGED * patch_size
    strips = object_map.reshape(size // patch_size, patch_size, size // width, width).swapaxes(1, 2)
    strips = strips.reshape(-1, patch_size * width)
    count = len(scene.objects)
    cover = np.stack([(strips == number).mean(1) for number in range(1, count + 1)], 1)
    object_of_strip = np.where(cover.max(1) > MIN_COVER, cover.argmax(1) + 1, 0)
    whole = [
        world.BACKGROUNDS.index(scene.background),
        count - 1 if count <= world.MAX_OBJECTS else NOTHING,
    ]
    # row 0: the labels of a strip without object; row k: those of a strip of object k
    rows = [[0, *whole] + [NOTHING] * (len(LABELS) - 3)]
    for item, (left, top, box_width, box_height) in zip(
        scene.objects, world.boxes(scene, object_map), strict=True
    ):
        corners = [
            int(100 * corner / size) for corner in (left, top, left + box_width, top + box_height)
        ]
        kinds = [VOCABULARY[kind].index(getattr(item, kind)) for kind in OBJECT_KINDS]
        rows.append([1, *whole, *kinds, *(c // 10 for c in corners), *(c % 10 for c in corners)])
    return np.array(rows)[object_of_strip]


def batch(split: str, first: int, count: int, patch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images uint8 [B, S, S, 3] and labels [B, V, len(LABELS)]; in split pretrain every second image is crowded."""
    images, labels = [], []
    for index in range(first, first + count):
        is_crowded = split == "pretrain" and index % 2
        numbers = (world.MAX_OBJECTS + 1, 7) if is_crowded else (1, world.MAX_OBJECTS)
        scene, *maps = world.draw(split, index, numbers)
        image, object_map = maps
        images.append(image)
        labels.append(strip_labels(scene, object_map, patch_size))
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels))


class Strips(nn.Module):
    """The ViT as MiniGPT-v2 reads it, with a linear head for each label."""

    def __init__(self, vit: nn.Module, width: int):
        super().__init__()
        self.vit, self.width = vit, width
        self.heads = nn.Linear(NUM_MERGED * width, sum(LABELS.values()))

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Return the logits [B, V, answers] of each label for normalised images [B, 3, S, S]."""
        # MiniGPT-v2's ln_vision has no weights
        tokens = F.layer_norm(self.vit(image).float(), (self.width,))
        return self.heads(join_patches(tokens, 1, "merged")).split(list(LABELS.values()), -1)

    def loss(self, image: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the sum of the labels' mean cross entropies."""
        pairs = zip(self(image), labels.unbind(-1), strict=True)
        return sum(
            F.cross_entropy(logits.flatten(0, 1).float(), label.flatten())
            for logits, label in pairs
        )


@torch.no_grad()
def accuracy(model: Strips, split: str, count: int, patch_size: int) -> dict[str, float]:
    """Return {label: accuracy} over the vectors to which the label applies, of the first `count` images of a split."""
    image, labels = batch(split, 0, count, patch_size)
    parts = [model(normalise(part, "cpu")) for part in image.split(64)]
    found = {}
    for i, name in enumerate(LABELS):
        guesses = torch.cat([part[i].argmax(-1) for part in parts])
        right = (guesses == labels[..., i])[labels[..., i] != NOTHING]
        found[name] = round(right.float().mean().item(), 4)
    return found


def train(model: Strips, args: argparse.Namespace, patch_size: int) -> Iterator[int]:
    """Train with linear warm-up and cosine decay; yield the number of steps made."""
    groups = [{"params": list(part.parameters())} for part in (model.vit, model.heads)]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, args.steps // 20)
    progress = trange(args.steps, unit="step", mininterval=10)
    for step in progress:
        done = max(0, step - warmup) / max(1, args.steps - warmup)
        rate = args.lr * min((step + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        # the heads start from random weights, the ViT from pretrained ones
        for group, factor in zip(optimizer.param_groups, (1, 4), strict=True):
            group["lr"] = rate * factor
        image, labels = batch(
            "pretrain", args.first + step * args.batch_size, args.batch_size, patch_size
        )
        loss = model.loss(normalise(image, "cpu"), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.2f}")
        yield step + 1


def export(model: Strips, args: argparse.Namespace, steps: int, patch_size: int) -> dict:
    """Write weights, dimensions and manifest; return the manifest."""
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "eva_vit_boxes.safetensors"
    save_file(
        {name: tensor.half().contiguous() for name, tensor in model.vit.state_dict().items()}, path
    )
    shutil.copyfile(WEIGHTS / "eva_vit.json", path.with_suffix(".json"))
    accuracies = {
        split: accuracy(model, split, args.images, patch_size) for split in world.EVAL_SPLITS
    }
    recipe = {"steps": steps, "batch_size": args.batch_size, "lr": args.lr, "world": world.VERSION}
    manifest = {"sha256": {path.name: file_sha256(path)}, "recipe": recipe, "accuracy": accuracies}
    (args.output / "manifest_boxes.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def main() -> None:
    """Train; export and print the manifest every CHECK_EVERY steps and at the end."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("output/pretrain_boxes"))
    parser.add_argument(
        "--start", type=Path, default=WEIGHTS / "eva_vit.safetensors", help="the ViT to start from"
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="number of the first image")
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--images", type=int, default=512, help="to measure with")
    args = parser.parse_args()
    torch.manual_seed(0)
    vision = Vision.small()
    vit, config = vision.visual_encoder, vision.vit_config
    config.load(vit, args.start, "--start")
    model = Strips(vit.float(), config.width)
    for steps in train(model, args, config.patch_size):
        if steps % CHECK_EVERY == 0 or steps == args.steps:
            print(json.dumps(export(model, args, steps, config.patch_size), indent=2), flush=True)


if __name__ == "__main__":
    main()
