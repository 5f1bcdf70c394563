"""The quickstart's vision part, the real classes at small size, and the question that each query answers."""

import dataclasses
import json
from pathlib import Path

import torch
from torch import nn

from minigpt4.models.vision.eva_vit import EvaVit
from minigpt4.models.vision.qformer import (
    QFormerConfig,
    build_qformer,
    from_release_name,
    to_release_name,
)
from minigpt4.quickstart import world

RELATIONS = ("left of", "above left of", "above", "above right of")
# {kind of question: answers}; class 0, not listed here, is 'there is no such object', so answer i is class 1 + i.
VOCABULARY = {
    "count": tuple(range(1, world.MAX_OBJECTS + 1)),
    "background": world.BACKGROUNDS,
    "size": world.SIZES,
    "colour": world.COLOURS,
    "shape": world.SHAPES,
    "cell": world.CELLS,
    "relation": RELATIONS,
}
_OBJECT = ("size", "colour", "shape", "cell")
# The question that query i answers: (kind, object number in reading order); a relation is to the next object.
QUERIES = (
    ("count", 0),
    ("background", 0),
    *((kind, 0) for kind in _OBJECT),
    ("relation", 0),
    *((kind, 1) for kind in _OBJECT),
    ("relation", 1),
    *((kind, 2) for kind in _OBJECT),
)


def relation(first: world.Object, second: world.Object) -> str:
    """Return the position of `first` relative to `second`, which comes later in reading order."""
    if first.row == second.row:
        return "left of"
    side = (first.column > second.column) - (first.column < second.column)
    return {-1: "above left of", 0: "above", 1: "above right of"}[side]


def answers(scene: world.Scene) -> list[int]:
    """Return the class of the right answer to each of QUERIES, see VOCABULARY."""

    def answer(kind: str, k: int) -> object:
        if kind == "count":
            return len(scene.objects)
        if kind == "background":
            return scene.background
        if kind == "relation":
            return relation(*scene.objects[k : k + 2]) if k + 1 < len(scene.objects) else None
        return getattr(scene.objects[k], kind) if k < len(scene.objects) else None

    values = [(kind, answer(kind, k)) for kind, k in QUERIES]
    return [0 if value is None else 1 + VOCABULARY[kind].index(value) for kind, value in values]


class Vision(nn.Module):
    """ViT, ln_vision, queries and Q-Former, named and computed as in MiniGPT4, without an LLM."""

    def __init__(self, vit: EvaVit, qformer: QFormerConfig):
        super().__init__()
        self.vit_config, self.qformer_config = vit, qformer
        self.visual_encoder = vit.build(world.IMAGE_SIZE, device="cpu")
        self.ln_vision = nn.LayerNorm(vit.embed_dim)
        self.Qformer = build_qformer(qformer, device="cpu")
        self.query_tokens = nn.Parameter(torch.randn(1, len(QUERIES), qformer.hidden_size) * 0.02)
        for part in self.Qformer.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0  # images never repeat, so there is nothing to overfit
        # on a CPU and short sequences, plain attention trains 1.7 times faster than the fused kernel
        self.Qformer.bert.set_attn_implementation("eager")
        for block in self.visual_encoder.blocks:
            block.attn.fused_attn = False

    @classmethod
    def small(cls) -> "Vision":
        """Return the network whose weights are committed: 6.4 M parameters."""
        return cls(
            EvaVit(192, 6, 6, 768, 14, world.IMAGE_SIZE), QFormerConfig(256, 4, 8, 1024, 2, 192)
        )

    @classmethod
    def tiny(cls) -> "Vision":
        """Return a network for tests, which trains a step in milliseconds."""
        return cls(EvaVit(32, 1, 2, 64, 14, world.IMAGE_SIZE), QFormerConfig(64, 1, 2, 64, 1, 32))

    def forward(
        self, image: torch.Tensor, num_queried: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens [B, 1 + N, Dv] of images [B, 3, S, S], and the query outputs [B', Q, Dq].

        The Q-Former runs on the first B' = `num_queried` images only (None: on all).
        """
        tokens = self.ln_vision(self.visual_encoder(image))
        return tokens, self.Qformer(self.query_tokens, tokens[:num_queried])

    def save(self, folder: Path) -> list[Path]:
        """Write fp16 weights for `vit_ckpt` and `q_former_model`, dimensions beside them; return the paths written."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        vit, rest = {}, {}
        for name, tensor in self.state_dict().items():
            half = tensor.half().contiguous()
            if name.startswith("visual_encoder."):
                vit[name.removeprefix("visual_encoder.")] = half
            else:
                rest[to_release_name(name)] = half
        written = []
        for stem, tensors, config in (
            ("eva_vit", vit, self.vit_config),
            ("blip2", rest, self.qformer_config),
        ):
            weights, dimensions = folder / f"{stem}.safetensors", folder / f"{stem}.json"
            save_file(tensors, weights)
            dimensions.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
            written += [weights, dimensions]
        return written

    @classmethod
    def load(cls, folder: Path) -> "Vision":
        """Return the network that `save` wrote to `folder`, in float32 and evaluation mode."""
        from safetensors.torch import load_file

        vit, qformer = (
            json.loads((folder / f"{stem}.json").read_text()) for stem in ("eva_vit", "blip2")
        )
        vision = cls(EvaVit(**vit), QFormerConfig(**qformer))
        state = {}
        for name, tensor in load_file(folder / "eva_vit.safetensors").items():
            state[f"visual_encoder.{name}"] = tensor.float()
        for name, tensor in load_file(folder / "blip2.safetensors").items():
            state[from_release_name(name)] = tensor.float()
        vision.load_state_dict(state)
        return vision.eval()
