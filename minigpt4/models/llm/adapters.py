"""LoRA, by peft: trained updates of low rank beside the query and value projections of a frozen LLM.

Names. A checkpoint of the newest release has those of peft 0.2.0 around the whole LLM; later versions of peft put the
adapter's name, `default`, before `.weight`, and `.base_layer` before that of the frozen weight. All are read.
"""

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from minigpt4.models.llm.quantised_layers import OWN_LAYERS

# Source: the newest release, which has no keys for these two.
TARGETS = ("q_proj", "v_proj")
DROPOUT = 0.05

_TENSOR = re.compile(r"\.lora_[AB]\.weight$")
# (what peft's names have here, what those of the release have)
_RENAMES = (
    (r"^llama_model\.", "llama_model.base_model.model."),
    (r"\.lm_head\.weight$", ".lm_head.0.weight"),
    (r"\.(lora_[AB])\.default\.", r".\1."),
    (r"\.base_layer\.", "."),
)


def add_lora(llm: nn.Module, rank: int, alpha: int) -> None:
    """Add an update of `rank`, counted alpha / rank, in float32, beside each target of a frozen LLM; they train.

    A starts as torch's linear layers do, B as zeros. Raises ValueError for an LLM without such layers.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    names = {name.rpartition(".")[2] for name, _ in llm.named_modules()}
    if not names.issuperset(TARGETS):
        raise ValueError(
            f"model.lora_r: {rank}, and {type(llm).__name__} has no layers {' and '.join(TARGETS)} for LoRA; take an "
            "LLM of LLaMA's kind, or set model.lora_r=0"
        )
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=list(TARGETS), lora_dropout=DROPOUT, bias="none"
    )
    # peft knows those of libraries
    config._register_custom_module(dict.fromkeys(OWN_LAYERS, Linear))
    with warnings.catch_warnings():
        # of ours, which it then takes
        warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
        inject_adapter_in_model(config, llm)
    for layer in _layers(llm):
        layer.lora_dropout = nn.ModuleDict(
            {name: _Dropout(part.p) for name, part in layer.lora_dropout.items()}
        )
    for name, parameter in llm.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


class _Dropout(nn.Dropout):
    """Keeps a byte a number for backward on any device; that of torch, on a CPU, a number in the input's type."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(x, self.p, True)[0] if self.training else x


def train(llm: nn.Module, mode: bool) -> None:
    """Let the updates drop inputs, or not; the LLM that they are beside stays in evaluation mode."""
    for layer in _layers(llm):
        layer.lora_dropout.train(mode)


@contextmanager
def without_dropout(llm: nn.Module) -> Iterator[None]:
    """Within the block nothing in the LLM is dropped, so that two ways to compute can be compared."""
    dropping = [part for part in llm.modules() if isinstance(part, nn.Dropout) and part.training]
    for part in dropping:
        part.eval()
    try:
        yield
    finally:
        for part in dropping:
            part.train()


def merge(llm: nn.Module) -> None:
    """Add the updates to the weights that they are beside: answers cost no more than the LLM's own.

    Raises ValueError for weights in 8 or 4 bits, which cannot hold them.
    """
    layers = list(_layers(llm))
    if any(not layer.get_base_layer().weight.is_floating_point() for layer in layers):
        raise ValueError(
            "weights in 8 or 4 bits cannot take LoRA in; load the LLM with model.llm_quantization=none"
        )
    for layer in layers:
        layer.merge(safe_merge=True)


def unmerge(llm: nn.Module) -> None:
    """Take back `merge`, but for rounding."""
    for layer in _layers(llm):
        layer.unmerge()


def _layers(llm: nn.Module) -> Iterable[nn.Module]:
    from peft.tuners.lora import LoraLayer

    return (part for part in llm.modules() if isinstance(part, LoraLayer))


def said(llm: nn.Module) -> str:
    """Return peft's line about what trains."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in llm.parameters()]
    trainable = sum(size for size, trains in sizes if trains)
    everything = sum(size for size, _ in sizes)
    return f"trainable params: {trainable} || all params: {everything} || trainable%: {100 * trainable / everything}"


def to_release_name(name: str) -> str:
    """Return the newest release's name of our parameter `name`, of a model whose LLM has LoRA."""
    for pattern, new in _RENAMES if name.startswith("llama_model.") else ():
        name = re.sub(pattern, new, name)
    return name


def in_release_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors under the release's names, whichever version of peft wrote them.

    Raises ValueError if two of them would have one name.
    """
    renamed = {}
    for name, tensor in state.items():
        new = name
        for pattern, short in _RENAMES[2:]:
            new = re.sub(pattern, short, new)
        if new in renamed:
            raise ValueError(
                f"{name} is there twice, in the names of two versions of peft; keep one of them"
            )
        renamed[new] = tensor
    return renamed


def is_lora(name: str) -> bool:
    """Whether that is the release's name of a tensor of LoRA."""
    return _TENSOR.search(name) is not None


def advice(state: dict[str, torch.Tensor], own: Iterable[str], rank: int) -> str:
    """Return what to do with a checkpoint whose LoRA is not the model's; nothing if they have the same rank."""
    theirs = {
        len(tensor)
        for name, tensor in state.items()
        if name.endswith(".lora_A.weight") and tensor.ndim == 2
    }
    if not theirs or (theirs == {rank} and any(map(is_lora, own))):
        return ""
    found = "/".join(map(str, sorted(theirs)))
    return f"It has LoRA of rank {found}, the model {rank or 'none'}: set model.lora_r={found}, as for MiniGPT-v2"
