"""The embedded default's vision parts (the same classes as the real ones, small) and what each query is asked."""

import torch
from torch import nn

from minigpt4.embedded import world

RELATIONS = ("left of", "above left of", "above", "above right of")

_OBJECT = ("size", "colour", "shape", "cell")
# What query i is asked: (kind, object number). A relation is that of object k to object k + 1 in reading order.
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
    """How `first` lies to `second`, which comes later in reading order."""
    if first.row == second.row:
        return "left of"
    return {-1: "above left of", 0: "above", 1: "above right of"}[(first.column > second.column) - (first.column < second.column)]


def answers(scene: world.Scene) -> list[int]:
    """The right answer to each of QUERIES; 0 stands for 'there is no such object'."""
    names = {"size": world.SIZES, "colour": world.COLOURS, "shape": world.SHAPES, "cell": world.CELLS}
    result = []
    for kind, k in QUERIES:
        if kind == "count":
            result.append(len(scene.objects))
        elif kind == "background":
            result.append(1 + world.BACKGROUNDS.index(scene.background))
        elif kind == "relation":
            pair = scene.objects[k : k + 2]
            result.append(1 + RELATIONS.index(relation(*pair)) if len(pair) == 2 else 0)
        else:
            result.append(1 + names[kind].index(getattr(scene.objects[k], kind)) if k < len(scene.objects) else 0)
    return result


class Vision(nn.Module):
    """ViT, ln_vision, queries and Q-Former: pictures [B, 3, S, S] to tokens [B, 1 + N, Dv] and queries [B, Q, Dq]."""

    NUM_ANSWERS = {"count": 1 + world.MAX_OBJECTS, "background": 1 + len(world.BACKGROUNDS), "size": 1 + len(world.SIZES),
                   "colour": 1 + len(world.COLOURS), "shape": 1 + len(world.SHAPES), "cell": 1 + len(world.CELLS),
                   "relation": 1 + len(RELATIONS)}  # fmt: skip

    def __init__(self, vit: dict, qformer: dict):
        super().__init__()
        from timm.models.eva import Eva
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        self.patch_size = vit["patch_size"]
        self.visual_encoder = Eva(
            img_size=world.IMAGE_SIZE, patch_size=vit["patch_size"], embed_dim=vit["embed_dim"], depth=vit["depth"],
            num_heads=vit["num_heads"], mlp_ratio=vit["mlp_dim"] / vit["embed_dim"], num_classes=0, global_pool="",
            use_post_transformer_norm=False, use_fc_norm=False,
        )  # fmt: skip
        self.ln_vision = nn.LayerNorm(vit["embed_dim"])
        self.Qformer = Blip2QFormerModel(
            Blip2QFormerConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, encoder_hidden_size=vit["embed_dim"], **qformer)
        )
        # Short sequences: plain attention trains 1.7 times faster on a CPU than the fused kernel's bf16 backward.
        self.Qformer.set_attn_implementation("eager")
        for block in self.visual_encoder.blocks:
            block.attn.fused_attn = False
        self.query_tokens = nn.Parameter(torch.randn(1, len(QUERIES), qformer["hidden_size"]) * 0.02)

    @classmethod
    def small(cls):
        return cls({"embed_dim": 192, "depth": 6, "num_heads": 6, "mlp_dim": 768, "patch_size": 14},
                   {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 1024, "cross_attention_frequency": 2})  # fmt: skip

    @classmethod
    def tiny(cls):
        return cls({"embed_dim": 32, "depth": 1, "num_heads": 2, "mlp_dim": 64, "patch_size": 14},
                   {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "cross_attention_frequency": 1})  # fmt: skip

    def forward(self, image, num_queried: int | None = None):
        """Tokens of all pictures, queries of the first `num_queried`."""
        tokens = self.ln_vision(self.visual_encoder.forward_features(image))
        seen = tokens[:num_queried]
        queries = self.query_tokens.expand(len(seen), -1, -1)
        return tokens, self.Qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
