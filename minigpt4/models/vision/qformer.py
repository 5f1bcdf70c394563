"""The Q-Former: learned queries that attend to image tokens; the network is that of transformers.

Shapes: B images, N image tokens of width W, Q queries of width H.
"""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class QFormerConfig:
    """Dimensions of a Q-Former; a weight file with others needs a JSON sidecar of the same stem. Source: BLIP-2."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    cross_attention_frequency: int = 2
    encoder_width: int = 1408


class QFormer(nn.Module):
    """Queries [1, Q, H] and image tokens [B, N, W] -> vectors [B, Q, H].

    The network is not made by `from_pretrained`, which would pin it to float32: under autocast it computes in the
    autocast type, as in 2023.
    """

    def __init__(self, config: QFormerConfig):
        super().__init__()
        from transformers import Blip2QFormerConfig, Blip2QFormerModel

        self.bert = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                intermediate_size=config.intermediate_size,
                cross_attention_frequency=config.cross_attention_frequency,
                encoder_hidden_size=config.encoder_width,
            )
        )

    def forward(self, query_tokens: torch.Tensor, image_embeds: torch.Tensor) -> torch.Tensor:
        """Return [B, Q, H] for queries [1, Q, H] and image tokens [B, N, W]."""
        queries = query_tokens.expand(image_embeds.shape[0], -1, -1)
        return self.bert(query_embeds=queries, encoder_hidden_states=image_embeds).last_hidden_state


def build_qformer(config: QFormerConfig, device: str = "meta") -> QFormer:
    """Return a QFormer; on the meta device its weights have no values."""
    with torch.device(device):
        return QFormer(config)


def new_qformer(planned: QFormer, query_tokens: nn.Parameter) -> tuple[QFormer, nn.Parameter]:
    """Return the Q-Former, moved from the meta device to the CPU, and queries [1, Q, H], both with random weights.

    They are initialised as transformers does, and frozen where the given ones are.
    """
    std = planned.bert.config.initializer_range
    planned.to_empty(device="cpu").bert.init_weights()
    queries = torch.empty(query_tokens.shape).normal_(std=std)
    return planned, nn.Parameter(queries, query_tokens.requires_grad)


# All differences between tensor names: (part of our name, part of the 2023 release's name).
_RENAMES = (
    ("Qformer.bert.layernorm.", "Qformer.bert.embeddings.LayerNorm."),
    (".attention.attention.", ".attention.self."),
    (".crossattention.attention.", ".crossattention.self."),
)


def to_release_name(name: str) -> str:
    """Return the 2023 release's name of our tensor `name`; names outside the Q-Former are the same."""
    return _rename(name, _RENAMES)


def from_release_name(name: str) -> str:
    """Return our name of the 2023 release's tensor `name`."""
    return _rename(name, [(new, old) for old, new in _RENAMES])


def _rename(name, pairs):
    if name.startswith("Qformer."):
        for old, new in pairs:
            name = name.replace(old, new)
    return name
