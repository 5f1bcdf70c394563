"""Pretrains the embedded default's small EVA ViT and Q-Former on drawn pictures, without any language model.

    python -m minigpt4.embedded.pretrain_vision [--quick] [--device cpu|cuda] [--resume] [--output FOLDER]

Every query of the Q-Former is asked one thing (QUERIES): how many objects, which background, the size, colour, shape and cell
of the k-th object in reading order, how it lies to the next one. Its output is compared by cosine with one learned code per
answer; the codes of a colour are the same for every object and have nothing to do with those of a shape, which is why
pairs that never occurred are read as well as any other. The ViT's tokens learn beside it which object, shape, colour and size
they look at. Codes and token heads are dropped afterwards; what stays is what BLIP-2 ships: ViT, ln_vision, queries, Q-Former.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from minigpt4.embedded import world
from minigpt4.embedded.vision import QUERIES, Vision, answers

DENSE = {"object": 1 + world.MAX_OBJECTS, "shape": len(world.SHAPES), "colour": len(world.COLOURS), "size": len(world.SIZES), "cell": len(world.CELLS)}


class Pictures(torch.utils.data.IterableDataset):
    """Batches (image uint8 [B, S, S, 3], query targets [B, Q], token targets [B, N, 5]) number `first`, first + 1, ..."""

    def __init__(self, first: int, last: int, batch_size: int, patch_size: int, split: str = "pretrain", num_crowded: int = 0):
        self.first, self.last, self.batch_size = first, last, batch_size
        self.patch_size, self.split, self.num_crowded = patch_size, split, num_crowded

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        start, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for batch in range(self.first + start, self.last, step):
            samples = [
                self.sample(batch * self.batch_size + i, crowded=i >= self.batch_size - self.num_crowded)
                for i in range(self.batch_size)
            ]
            yield tuple(torch.from_numpy(np.stack(part)) for part in zip(*samples, strict=True))

    def sample(self, index: int, crowded: bool):
        numbers = (world.MAX_OBJECTS + 1, len(world.CELLS)) if crowded else (1, world.MAX_OBJECTS)
        scene, image, object_map = world.picture(self.split, index, numbers)
        jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90 + index % 10])[1]  # the pictures of both stages are JPEGs
        return cv2.imdecode(jpeg, cv2.IMREAD_COLOR), np.array(answers(scene)), self.token_targets(scene, object_map)

    def token_targets(self, scene: world.Scene, object_map: np.ndarray) -> np.ndarray:
        """[N, 5]: object number (0: none), its shape, colour, size and cell (-100: none) where it covers a fifth of the patch."""
        p, side = self.patch_size, object_map.shape[0] // self.patch_size
        patches = object_map.reshape(side, p, side, p).transpose(0, 2, 1, 3).reshape(side * side, p * p)
        cover = np.stack([(patches == k).mean(1) for k in range(1, len(scene.objects) + 1)], 1)
        number = np.where(cover.max(1) > 0.2, cover.argmax(1) + 1, 0)
        nothing = [0, -100, -100, -100, -100]
        rows = [nothing] + [
            [k if len(scene.objects) <= world.MAX_OBJECTS else -100, world.SHAPES.index(o.shape), world.COLOURS.index(o.colour), world.SIZES.index(o.size), world.CELLS.index(o.cell)]
            for k, o in enumerate(scene.objects, 1)
        ]
        return np.array(rows)[number]


class Pretraining(nn.Module):
    """Vision with what is needed to train it: one codebook per question, one linear head per token label."""

    def __init__(self, vision: Vision):
        super().__init__()
        self.vision = vision
        width = vision.query_tokens.shape[-1]
        self.codes = nn.ParameterDict({k: nn.Parameter(torch.randn(n, width)) for k, n in vision.NUM_ANSWERS.items()})
        self.token_heads = nn.ModuleDict({k: nn.Linear(vision.ln_vision.normalized_shape[0], n) for k, n in DENSE.items()})

    def forward(self, image, num_crowded: int = 0):
        """Logits per query, a list of [B - num_crowded, answers]; logits per token label, a dict of [B, N, classes]."""
        tokens, queries = self.vision(image, len(image) - num_crowded)
        logits = [
            16 * F.normalize(queries[:, i].float(), dim=-1) @ F.normalize(self.codes[kind].float(), dim=-1).T
            for i, (kind, _) in enumerate(QUERIES)
        ]
        return logits, {k: head(tokens[:, 1:]) for k, head in self.token_heads.items()}

    def loss(self, image, targets, token_targets, num_crowded: int = 0):
        logits, token_logits = self(image, num_crowded)
        targets = targets[: len(image) - num_crowded]
        query_loss = torch.stack([F.cross_entropy(x, t) for x, t in zip(logits, targets.unbind(1), strict=True)]).mean()
        token_losses = [
            F.cross_entropy(token_logits[k].flatten(0, 1).float(), token_targets[..., i].flatten())
            for i, k in enumerate(DENSE)
        ]
        self.last_token_losses = [x.detach() for x in token_losses]
        return query_loss + 0.5 * sum(token_losses), query_loss


def normalise(image: torch.Tensor, device) -> torch.Tensor:
    """uint8 [B, S, S, 3] RGB to float [B, 3, S, S] with CLIP's mean and deviation, as the processors give."""
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073), device=device)
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711), device=device)
    return ((image.to(device).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def accuracy(model: Pretraining, split: str, count: int, device) -> dict[str, float]:
    """Share of right answers per kind of question (over objects that are there), and of pictures right in all."""
    model.eval()
    batches = Pictures(0, math.ceil(count / 64), 64, model.vision.patch_size, split)
    right = []
    kept = []
    for image, targets, _ in batches:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits, _ = model(normalise(image, device))
        guess = torch.stack([x.argmax(-1).cpu() for x in logits], 1)
        right.append(guess == targets)
        kept.append(torch.stack([t != 0 for t in targets.unbind(1)], 1))
    right, kept = torch.cat(right), torch.cat(kept)
    model.train()
    result = {}
    for kind in model.vision.NUM_ANSWERS:
        columns = [i for i, (k, _) in enumerate(QUERIES) if k == kind]
        result[kind] = (right[:, columns][kept[:, columns]]).float().mean().item()
    result["exact"] = right.all(1).float().mean().item()
    return {k: round(v, 4) for k, v in result.items()}


def learning_rate(step: int, total: int, peak: float, warmup: int) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute's worth of a smaller network: proves the pipeline, learns little")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--output", type=Path, default=Path("output/pretrain_vision"))
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args()


def main():
    args = parse_args()
    total = args.steps or (20 if args.quick else 12000)
    torch.manual_seed(0)
    vision = Vision.small() if not args.quick else Vision.tiny()
    model = Pretraining(vision).to(args.device)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.98))
    checkpoint = args.output / "checkpoint.pt"
    args.output.mkdir(parents=True, exist_ok=True)
    step = 0
    if args.resume and checkpoint.is_file():
        state = torch.load(checkpoint, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    num_crowded = args.batch_size // 4
    data = Pictures(step, total, args.batch_size, vision.patch_size, num_crowded=num_crowded)
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=8)
    log = open(args.output / "log.jsonl", "a")
    start, first = time.time(), step
    mean_loss = None
    for image, targets, token_targets in loader:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, args.lr, min(400, total // 5 + 1))
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            loss, query_loss = model.loss(normalise(image, args.device), targets.to(args.device), token_targets.to(args.device), num_crowded)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        step += 1
        value = torch.stack([loss.detach(), query_loss.detach()])
        mean_loss = value if mean_loss is None else 0.98 * mean_loss + 0.02 * value
        if step % 50 == 0:
            rate = (step - first) / (time.time() - start)
            print(f"step {step}/{total} loss {mean_loss[0]:.4f} queries {mean_loss[1]:.4f} {rate * args.batch_size:.0f} pictures/s "
                  f"eta {(total - step) / rate / 60:.1f} min", flush=True)  # fmt: skip
        if step % 500 == 0 or step == total:
            result = {s: accuracy(average.module, s, 256, args.device) for s in world.EVAL_SPLITS}
            print(result, {k: round(v.item(), 3) for k, v in zip(DENSE, model.last_token_losses)}, flush=True)
            log.write(json.dumps({"step": step, "loss": mean_loss.tolist(), "seconds": time.time() - start, **result}) + "\n")
            log.flush()
            state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)


if __name__ == "__main__":
    main()
