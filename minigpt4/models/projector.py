"""The projection of vision vectors into the LLM's embedding space: one linear layer as in 2023, or two with a GELU."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from minigpt4.common.checkpoint import CheckpointError

KINDS = ("linear", "mlp2x_gelu")
# for messages: which bridge gives narrow vectors, and the usual LLM of a width
_BRIDGES = "those of a Q-Former are narrow ({}), merged patches wide ({})"
_LLM_SIZES = {4096: " (7B)", 5120: " (13B)"}
# {kind: name of the weight of its last, or its first, layer}
_LAST = {"linear": "llama_proj.weight", "mlp2x_gelu": "llama_proj.2.weight"}
_FIRST = {"linear": "llama_proj.weight", "mlp2x_gelu": "llama_proj.0.weight"}


def build(kind: str, width: int, llm_width: int, device: torch.device | str) -> nn.Module:
    """Return the projection of one of KINDS from `width` to `llm_width`, with torch's default initialisation."""
    first = nn.Linear(width, llm_width, device=device)
    if kind == "linear":
        return first
    return nn.Sequential(first, nn.GELU(), nn.Linear(llm_width, llm_width, device=device))


def kind_of(state: Mapping[str, torch.Tensor]) -> str | None:
    """Return which of KINDS the projection in a checkpoint's `state` is; None without one."""
    return next((kind for kind, name in _LAST.items() if name in state), None)


def widths(state: Mapping[str, torch.Tensor]) -> tuple[int, int] | None:
    """Return (width of the vision vectors, width of the LLM) of the projection in `state`; None without one."""
    kind = kind_of(state)
    weights = [state.get(_FIRST.get(kind)), state.get(_LAST.get(kind))]
    if any(weight is None or weight.ndim != 2 for weight in weights):
        return None
    return weights[0].shape[1], len(weights[1])


def check(
    state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], where: str, path: Path | str
) -> None:
    """Raise CheckpointError if a checkpoint's projection differs in kind or widths from the model's, `own`."""
    found, ours = kind_of(state), kind_of(own)
    if found not in (None, ours):
        raise CheckpointError(
            f"{where}: '{path}' has a projection {found}, the model {ours}: the layers are others; set "
            f"model.projector={found}"
        )
    theirs = widths(state)
    if theirs is None or theirs == widths(own):
        return
    (width, llm_width), (own_width, own_llm_width) = theirs, widths(own)
    if llm_width != own_llm_width:
        raise CheckpointError(
            f"{where}: '{path}' was trained for a {llm_width}-wide LLM{_LLM_SIZES.get(llm_width, '')}, "
            f"model.llama_model is {own_llm_width} wide{_LLM_SIZES.get(own_llm_width, '')}; give a checkpoint and "
            "an LLM of one size"
        )
    raise CheckpointError(
        f"{where}: '{path}' projects image vectors of width {width}, the model has {own_width}-wide "
        f"ones: {_BRIDGES.format(*sorted((width, own_width)))}; set model.has_qformer as it was trained"
    )
