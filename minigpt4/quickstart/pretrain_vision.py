"""Pretrain the quickstart's small EVA ViT and Q-Former on drawn images, without any LLM.

    python -m minigpt4.quickstart.pretrain_vision [--quick] [--device cpu|cuda] [--resume] [--output FOLDER]

Each query of the Q-Former learns to answer one question (vision.QUERIES): how many objects there are, which background,
the size, colour, shape and cell of the k-th object in reading order, its position relative to the next one. Training
pulls the query's output, in cosine similarity, towards a fixed code of the right answer. A colour has the same code for
every object, and colours share nothing with shapes, so that unseen colour-shape pairs can be told like any other. At the
same time each token of the ViT learns which object it looks at, also in crowded images (four to nine objects), which hold
more to learn from. Codes and token heads are dropped at the end; what remains is what BLIP-2 ships: ViT, ln_vision,
queries, Q-Former. Writes their weights, and manifest.json with the results.
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
SHARPNESS = 16  # factor on the cosines before softmax: an inverse temperature


def answer_codes(width: int) -> dict[str, torch.Tensor]:
    """Return {kind of question: unit vectors [1 + answers, width]}; every answer has channels of its own.

    `llama_proj` learns somewhat faster from these than from codes in general position (docs/embedded.md): AdamW scales
    each weight by its own gradients, and a weight that serves a single answer is not disturbed by others.
    """
    sizes = {kind: 1 + len(values) for kind, values in VOCABULARY.items()}
    num_codes = sum(sizes.values())
    codes = F.normalize(torch.eye(num_codes).repeat_interleave(width // num_codes, 1), dim=1)
    codes = F.pad(codes, (0, width - codes.shape[1]))
    return dict(zip(sizes, codes.split(list(sizes.values())), strict=True))


class Pretraining(nn.Module):
    """The vision part with what its training needs: a code per answer, and a linear head per token label."""

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
        """Return the logits of the queries, a list of [B', 1 + answers], and of the token labels, a list of [B, N, classes].

        The queries run on the first B' = `num_queried` images only (None: on all).
        """
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
        """Return the training loss, and one of its terms: 1 - mean cosine between query outputs and right codes."""
        logits, token_logits = self(image, num_queried)
        targets = targets[:num_queried].unbind(1)
        query_loss = torch.stack(list(map(F.cross_entropy, logits, targets))).mean()
        # Outputs close to their code whatever else is in the image act like words with a fixed meaning, which one linear
        # layer can learn to translate for an LLM in a few hundred steps.
        right = [x.gather(1, t[:, None]) for x, t in zip(logits, targets, strict=True)]
        spread = 1 - (torch.cat(right) / SHARPNESS).mean()
        token_logits = [x.flatten(0, 1) for x in token_logits]
        token_targets = token_targets.flatten(0, 1).unbind(1)
        token_loss = sum(map(F.cross_entropy, token_logits, token_targets))
        return query_loss + spread + 0.5 * token_loss, spread


def normalise(image: torch.Tensor, device: str) -> torch.Tensor:
    """Return RGB images uint8 [B, S, S, 3] as float [B, 3, S, S], normalised by CLIP's mean and standard deviation."""
    mean, std = torch.tensor(CLIP_MEAN, device=device), torch.tensor(CLIP_STD, device=device)
    return ((image.to(device).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def accuracy(model: Pretraining, split: str, count: int, device: str) -> dict[str, float]:
    """Return the accuracy per kind of question, over objects that exist, on `count` images (a multiple of 64) of a split.

    "exact": the share of images with all answers right.
    """
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
    """The state of one pretraining: model, moving average of its weights, optimizer, step. All of it is checkpointed."""

    def __init__(self, args: argparse.Namespace):
        torch.manual_seed(0)
        self.args, self.step = args, 0
        self.model = Pretraining(Vision.tiny() if args.quick else Vision.small()).to(args.device)
        ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.995)
        # the averaged weights are the ones exported
        self.average = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=ema)
        # no weight decay on biases and norms
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
        """Return this step's learning rate: linear warm-up, then cosine decay to a fiftieth."""
        warmup = min(400, self.args.steps // 5 + 1)
        if self.step < warmup:
            return self.args.lr * (self.step + 1) / warmup
        done = (self.step - warmup) / max(1, self.args.steps - warmup)
        return self.args.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    def train(self) -> None:
        """Train to the last step; print the held-out accuracy and save every CHECK_EVERY steps."""
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
        """Make one optimizer step on a batch of DrawnImages; return both values of `Pretraining.loss`."""
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
        """Write the checkpoint; a rename puts it in place complete."""
        parts = {
            name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer")
        }
        torch.save({**parts, "step": self.step}, self.path.with_suffix(".tmp"))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def export(self, seconds: float) -> dict:
        """Write the averaged weights and manifest.json; return the manifest."""
        self.average.module.cpu()
        files = self.average.module.vision.save(self.args.output)
        num_images = 64 if self.args.quick else 1024
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
                split: accuracy(self.average.module, split, num_images, "cpu")
                for split in world.EVAL_SPLITS
            },
        }
        (self.args.output / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        return manifest


def parse_args() -> argparse.Namespace:
    """Return the parsed command line."""
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
