"""LoRA, by peft: trained low-rank updates of the query and value projections of a frozen LLM.

Tensor names: a checkpoint of the newest release has those of peft 0.2.0, wrapped around the whole LLM. Later versions
of peft insert the adapter's name, `default`, before `.weight`, and `.base_layer` before the frozen layer's `.weight`.
Both are read.
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

_LORA_TENSOR = re.compile(r"\.lora_[AB]\.weight$")
# (pattern in our names, its replacement in the names of the release)
_RENAMES = (
    (r"^llama_model\.", "llama_model.base_model.model."),
    (r"\.lm_head\.weight$", ".lm_head.0.weight"),
    (r"\.(lora_[AB])\.default\.", r".\1."),
    (r"\.base_layer\.", "."),
)


def add_lora(llm: nn.Module, rank: int, alpha: int) -> None:
    """Add a trainable float32 update of `rank`, scaled by alpha / rank, to each target layer; the rest is frozen.

    A is initialised like torch's linear layers, B with zeros. Raises ValueError for an LLM without the target layers.
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
    # peft does not know our quantised layers; once registered it accepts them, but still warns
    config._register_custom_module(dict.fromkeys(OWN_LAYERS, Linear))
    with warnings.catch_warnings():
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
    """Dropout that saves one byte per element for backward; on a CPU torch's saves an element of the input's type."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(x, self.p, True)[0] if self.training else x


def train(llm: nn.Module, mode: bool) -> None:
    """Switch the dropout of the updates on or off; the LLM itself stays in evaluation mode."""
    for layer in _layers(llm):
        layer.lora_dropout.train(mode)


@contextmanager
def without_dropout(llm: nn.Module) -> Iterator[None]:
    """Within the block the LLM has no dropout, so that two computations can be compared."""
    active = [part for part in llm.modules() if isinstance(part, nn.Dropout) and part.training]
    for part in active:
        part.eval()
    try:
        yield
    finally:
        for part in active:
            part.train()


def merge(llm: nn.Module) -> None:
    """Add the updates to the weights of their layers, so that inference costs no more than without LoRA.

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
    """Undo `merge`, except for rounding."""
    for layer in _layers(llm):
        layer.unmerge()


def _layers(llm: nn.Module) -> Iterable[nn.Module]:
    from peft.tuners.lora import LoraLayer

    return (part for part in llm.modules() if isinstance(part, LoraLayer))


def parameter_summary(llm: nn.Module) -> str:
    """Return the line about trainable parameters that peft prints."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in llm.parameters()]
    trainable = sum(size for size, trains in sizes if trains)
    everything = sum(size for size, _ in sizes)
    return f"trainable params: {trainable} || all params: {everything} || trainable%: {100 * trainable / everything}"


def to_release_name(name: str) -> str:
    """Return the newest release's name of our parameter `name`, for a model with LoRA."""
    if name.startswith("llama_model."):
        for pattern, new in _RENAMES:
            name = re.sub(pattern, new, name)
    return name


def in_release_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a checkpoint's tensors under the release's names, whichever version of peft wrote it.

    Raises ValueError if two tensors would have the same name.
    """
    renamed = {}
    for name, tensor in state.items():
        new = name
        for pattern, replacement in _RENAMES[2:]:
            new = re.sub(pattern, replacement, new)
        if new in renamed:
            raise ValueError(
                f"{name} is there twice, in the names of two versions of peft; keep one of them"
            )
        renamed[new] = tensor
    return renamed


def is_lora(name: str) -> bool:
    """Whether `name` is the release's name of a LoRA tensor."""
    return _LORA_TENSOR.search(name) is not None


def advice(state: dict[str, torch.Tensor], own: Iterable[str], rank: int) -> str:
    """Return advice for a checkpoint `state` whose LoRA rank is not that of the model; "" if it is, or without LoRA.

    `own`: the names of the model's parameters. `rank`: its `lora_r`.
    """
    ranks = set()
    for name, tensor in state.items():
        if name.endswith(".lora_A.weight") and tensor.ndim == 2:
            ranks.add(len(tensor))
    if not ranks or (ranks == {rank} and any(map(is_lora, own))):
        return ""
    found = "/".join(map(str, sorted(ranks)))
    return f"It has LoRA of rank {found}, the model {rank or 'none'}: set model.lora_r={found}, as for MiniGPT-v2"
