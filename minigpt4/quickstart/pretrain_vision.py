"""Pretrains the quickstart's small EVA ViT and Q-Former on drawn images, without any LLM.

    python -m minigpt4.quickstart.pretrain_vision [--quick] [--device cpu|cuda] [--resume] [--output FOLDER]

Every query of the Q-Former is asked one thing (vision.QUERIES): how many objects, which background,
the size, colour, shape and cell of the k-th object in reading order, how it lies to the next one. Its
output is drawn, by cosine, to a code of the right answer. A colour has the same code for every object,
and colours share nothing with shapes: pairs that never occurred can be told like any other. The ViT's
tokens learn beside it which object they look at, also in crowded images (four to nine objects), which
hold more to learn from. Codes and token heads are dropped at the end; what stays is what BLIP-2 ships:
ViT, ln_vision, queries, Q-Former. Written: their weights, and manifest.json with the results.
"""

import argparse
import json
import math
import os
import subprocess
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from minigpt4.common.utils import file_sha256
from minigpt4.processors.blip_processors import CLIP_MEAN, CLIP_STD
from minigpt4.quickstart import world
from minigpt4.quickstart.drawn_images import TOKEN_LABELS, DrawnImages
from minigpt4.quickstart.vision import QUERIES, VOCABULARY, Vision

CHECK_EVERY = 500  # steps
SHARPNESS = 16  # of the softmax over cosines


def answer_codes(width: int) -> dict[str, torch.Tensor]:
    """Unit vectors [1 + answers, width] for each kind of question: every answer has channels of its own.

    `llama_proj` learns somewhat faster so than from codes in general position (docs/embedded.md): AdamW
    scales each weight by its own gradients; one that serves a single answer is not disturbed by others.
    """
    sizes = {kind: 1 + len(values) for kind, values in VOCABULARY.items()}
    number = sum(sizes.values())
    codes = F.normalize(torch.eye(number).repeat_interleave(width // number, 1), dim=1)
    codes = F.pad(codes, (0, width - codes.shape[1]))
    return dict(zip(sizes, codes.split(list(sizes.values())), strict=True))


class Pretraining(nn.Module):
    """Vision with what it takes to train it: a code per answer, one linear head per token label."""

    def __init__(self, vision: Vision):
        super().__init__()
        self.vision = vision
        queries, tokens = vision.qformer_config.hidden_size, vision.vit_config.embed_dim
        for kind, code in answer_codes(queries).items():
            self.register_buffer(f"code_{kind}", code, persistent=False)
        self.token_heads = nn.ModuleDict(
            {kind: nn.Linear(tokens, n) for kind, n in TOKEN_LABELS.items()}
        )

    def forward(self, image: torch.Tensor, num_queried: int | None = None) -> tuple[list, list]:
        """Logits of each query, a list of [B', answers], and of each token label, of [B, N, classes]."""
        tokens, queries = self.vision(image, num_queried)
        queries = F.normalize(queries.float(), dim=-1)
        logits = []
        for number, (kind, _) in enumerate(QUERIES):
            logits.append(SHARPNESS * queries[:, number] @ getattr(self, f"code_{kind}").T)
        return logits, [head(tokens[:, 1:]).float() for head in self.token_heads.values()]

    def loss(
        self,
        image: torch.Tensor,
        targets: torch.Tensor,
        token_targets: torch.Tensor,
        num_queried: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(Loss to train on, 1 - mean cosine of query outputs and right codes)."""
        logits, token_logits = self(image, num_queried)
        targets = targets[:num_queried].unbind(1)
        query_loss = torch.stack(list(map(F.cross_entropy, logits, targets))).mean()
        # Outputs close to their code, whatever else is in the image: each query becomes a word of its
        # own, which is what one linear layer can teach an LLM to read in a few hundred steps.
        right = [x.gather(1, t[:, None]) for x, t in zip(logits, targets, strict=True)]
        spread = 1 - (torch.cat(right) / SHARPNESS).mean()
        token_logits = [x.flatten(0, 1) for x in token_logits]
        token_targets = token_targets.flatten(0, 1).unbind(1)
        token_loss = sum(map(F.cross_entropy, token_logits, token_targets))
        return query_loss + spread + 0.5 * token_loss, spread


def normalise(image: torch.Tensor, device: str) -> torch.Tensor:
    """uint8 [B, S, S, 3] to float [B, 3, S, S] with CLIP's mean and deviation, as in training."""
    mean, std = torch.tensor(CLIP_MEAN, device=device), torch.tensor(CLIP_STD, device=device)
    return ((image.to(device).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def accuracy(model: Pretraining, split: str, count: int, device: str) -> dict[str, float]:
    """Accuracy per kind of question, over objects that are there; `exact`: share of images right in all."""
    model.eval()
    guesses, truth = [], []
    patch_size = model.vision.vit_config.patch_size
    for image, targets, _ in DrawnImages(split, 0, count // 64, 64, patch_size):
        logits, _ = model(normalise(image, device))
        guesses.append(torch.stack([x.argmax(-1).cpu() for x in logits], 1))
        truth.append(targets)
    model.train()
    guesses, truth = torch.cat(guesses), torch.cat(truth)
    right = guesses == truth
    result = {}
    for kind in VOCABULARY:
        columns = [i for i, (k, _) in enumerate(QUERIES) if k == kind]
        result[kind] = right[:, columns][truth[:, columns] > 0].float().mean().item()
    result["exact"] = right.all(1).float().mean().item()
    return {kind: round(share, 4) for kind, share in result.items()}


class Run:
    """Everything of one pretraining that a checkpoint holds."""

    def __init__(self, args: argparse.Namespace):
        torch.manual_seed(0)
        self.args, self.step = args, 0
        self.model = Pretraining(Vision.tiny() if args.quick else Vision.small()).to(args.device)
        ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
        # what is saved in the end
        self.average = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=ema)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": 0.05},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        self.path = args.output / "checkpoint.pt"
        if args.resume and self.path.is_file():
            state = torch.load(self.path, map_location=args.device, weights_only=True)
            self.step = state.pop("step")
            for name, part in state.items():
                getattr(self, name).load_state_dict(part)

    def learning_rate(self) -> float:
        """Linear warm-up, then half a cosine down to a fiftieth."""
        warmup = min(400, self.args.steps // 5 + 1)
        if self.step < warmup:
            return self.args.lr * (self.step + 1) / warmup
        done = (self.step - warmup) / max(1, self.args.steps - warmup)
        return self.args.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    def train(self) -> None:
        """Train to the last step, with a check and a checkpoint every CHECK_EVERY steps."""
        args = self.args
        num_crowded = args.batch_size // 4
        patch_size = self.model.vision.vit_config.patch_size
        data = DrawnImages(
            "pretrain", self.step, args.steps, args.batch_size, patch_size, num_crowded
        )
        loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=args.workers)
        with tqdm(total=args.steps, initial=self.step, unit="step", mininterval=5) as progress:
            for image, *targets in loader:
                loss = self.train_step(image, targets, args.batch_size - num_crowded)
                progress.update()
                if self.step % 50 == 0:
                    progress.set_postfix(loss=f"{loss[0]:.3f}", spread=f"{loss[1]:.3f}")
                if self.step % CHECK_EVERY == 0:
                    progress.write(
                        f"step {self.step}: {accuracy(self.average.module, 'held_out', 256, args.device)}"
                    )
                    self.save()

    def train_step(
        self, image: torch.Tensor, targets: list[torch.Tensor], num_queried: int
    ) -> tuple[float, float]:
        """One update on a batch of DrawnImages; returns the loss and the outputs' distance to their codes."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        with torch.autocast(torch.device(self.args.device).type, torch.bfloat16):
            targets = [target.to(self.args.device) for target in targets]
            image = normalise(image, self.args.device)
            loss, spread = self.model.loss(image, *targets, num_queried)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.step += 1
        return loss.item(), spread.item()

    def save(self) -> None:
        """Write the checkpoint, in one rename."""
        parts = {
            name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer")
        }
        torch.save({**parts, "step": self.step}, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def export(self, seconds: float) -> dict:
        """Write the averaged weights and manifest.json; return the manifest."""
        self.average.module.cpu()
        files = self.average.module.vision.save(self.args.output)
        count = 64 if self.args.quick else 1024
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        manifest = {
            "sha256": {file.name: file_sha256(file) for file in files},
            "recipe": {
                "steps": self.step,
                "batch_size": self.args.batch_size,
                "lr": self.args.lr,
                "world": world.VERSION,
            },
            "commit": commit or None,
            "seconds_of_last_call": round(seconds),
            "accuracy": {
                split: accuracy(self.average.module, split, count, "cpu")
                for split in world.EVAL_SPLITS
            },
        }
        (self.args.output / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        return manifest


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny network and a few steps: the whole way in seconds",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--resume", action="store_true", help="resume from the checkpoint in --output"
    )
    parser.add_argument("--output", type=Path, default=Path("output/pretrain_vision"))
    parser.add_argument("--steps", type=int, help="default: 4000, or 30 with --quick")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    args.steps = args.steps or (30 if args.quick else 4000)
    return args


def main() -> None:
    """Pretrain, export, print the manifest."""
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    start, run = time.time(), Run(args)
    run.train()
    run.save()
    print(json.dumps(run.export(time.time() - start), indent=2))


if __name__ == "__main__":
    main()
