"""The Q-Former: learned queries that look at image tokens, on transformers' network.

Shapes: B images, N image tokens of width W, Q queries of width H.
"""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class QFormerConfig:
    """Dimensions; a weight file of other ones has them beside it, in a JSON file of the same stem. Source: BLIP-2."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    cross_attention_frequency: int = 2
    encoder_width: int = 1408


class QFormer(nn.Module):
    """`bert(query_embeds=[B, Q, H], encoder_hidden_states=[B, N, W]).last_hidden_state` gives [B, Q, H].

    Built by us, not by `from_pretrained`, it is not pinned to float32: under autocast it computes in the autocast's
    type, as in 2023.
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
    """Return the QFormer; on the meta device nothing is initialised."""
    with torch.device(device):
        return QFormer(config)


def new_qformer(planned: QFormer, query_tokens: nn.Parameter) -> tuple[QFormer, nn.Parameter]:
    """Return a Q-Former and queries [1, Q, H] as transformers initialises them, frozen where the planned ones are."""
    std = planned.bert.config.initializer_range
    planned.to_empty(device="cpu").bert.init_weights()
    queries = torch.empty(query_tokens.shape).normal_(std=std)
    return planned, nn.Parameter(queries, query_tokens.requires_grad)


# (what our names have, what the names of the 2023 release have), the whole difference
_RENAMES = (
    ("Qformer.bert.layernorm.", "Qformer.bert.embeddings.LayerNorm."),
    (".attention.attention.", ".attention.self."),
    (".crossattention.attention.", ".crossattention.self."),
)


def to_release_name(name: str) -> str:
    """Return the 2023 release's name of our tensor `name` (names of other parts are equal)."""
    return _rename(name, _RENAMES)


def from_release_name(name: str) -> str:
    """Return our name of the 2023 release's tensor `name`."""
    return _rename(name, [(new, old) for old, new in _RENAMES])


def _rename(name, pairs):
    if name.startswith("Qformer."):
        for old, new in pairs:
            name = name.replace(old, new)
    return name
