"""Weights of the frozen LLM in 8 or 4 bits; embeddings, norms and the output layer keep their type.

int8   one scale per row; computes in the type of the activations; inference and training on any device
int4   groups of 32 with scale and zero point, PyTorch's own int4 kernels in bfloat16; inference only
nf4    bitsandbytes: 16 levels of a normal distribution, one scale per 64 weights; CPU and CUDA, training on CUDA only
"""

import torch
from torch import Tensor, nn

from minigpt4.common.versions import is_installed
from minigpt4.models.llm.quantised_layers import INT4_GROUP, LAYERS, Int4Linear, QuantisedLinear

KINDS = ("none", "int8", "nf4", "int4")
NF4_GROUP = 64  # weights per scale. Source: bitsandbytes' default


def kind_of(llm_quantization: str, low_resource: bool) -> str:
    """Return one of KINDS; `low_resource`, the key of 2023, alone means int8."""
    return "int8" if low_resource and llm_quantization == "none" else llm_quantization


def device_of(device: torch.device, gpu: int | str) -> torch.device:
    """Return the device of quantised weights: `device`; `model.device_8bit` decides if it is a GPU without an index."""
    if device != torch.device("cuda"):
        return device
    return torch.device(f"cuda:{gpu}" if str(gpu).isdigit() else gpu)


def check_device(kind: str, device: torch.device) -> None:
    """Raise ValueError if weights of `kind` do not run on `device`."""
    if device.type == "mps" and kind in ("int4", "nf4"):
        raise ValueError(
            f"model.llm_quantization: {kind} runs on CPU and CUDA, run.device is {device}; take int8"
        )
    # `--dry-run` may plan for a GPU that this machine does not have
    if kind == "int4" and device.type == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise ValueError(
                "model.llm_quantization: int4 needs a GPU of compute capability 8.0 (Ampere) or newer, "
                f"{device} has {major}.{minor}; take nf4 or int8"
            )


def refusal_to_train(kind: str, device: torch.device) -> str | None:
    """Return why the kernels of `kind` give no gradient on `device`, None if they do."""
    if kind == "nf4" and not is_installed("bitsandbytes"):
        return "model.llm_quantization: nf4 needs bitsandbytes, which is not installed; pip install it, or take int8"
    # bitsandbytes' packed nf4 kernel for CPUs has no backward
    if kind != "int4" and (kind, device.type) != ("nf4", "cpu"):
        return None
    return f"model.llm_quantization: {kind} answers but does not train on {device}; train with int8"


def refuse_training(llm: nn.Module, kind: str, device: torch.device) -> None:
    """Make `llm` raise ValueError when asked for a gradient that the kernels of `kind` do not give on `device`."""
    refusal = refusal_to_train(kind, device)

    def check(module: nn.Module, args: tuple, kwargs: dict) -> None:
        embeds = kwargs.get("inputs_embeds")
        if torch.is_grad_enabled() and embeds is not None and embeds.requires_grad:
            raise ValueError(refusal)

    if refusal:
        llm.register_forward_pre_hook(check, with_kwargs=True)


def linears(llm: nn.Module) -> dict[str, nn.Linear]:
    """Return {name: layer} of the layers that are quantised: all linear ones but the output layer."""
    output, named = llm.get_output_embeddings(), llm.named_modules()
    return {
        name: part for name, part in named if isinstance(part, nn.Linear) and part is not output
    }


def has_product_backward(layer: nn.Module) -> bool:
    """Whether `product_backward` supports this linear layer; not bitsandbytes' on a CPU, which may repack its weights."""
    if isinstance(layer, QuantisedLinear):
        return type(layer) is not Int4Linear
    return getattr(layer.weight, "quant_state", None) is not None and layer.weight.is_cuda


def product_backward(layer: nn.Module, gradient: Tensor) -> Tensor:
    """Return the gradient of a quantised layer's output [T, out] with respect to its input, [T, in]."""
    if isinstance(layer, QuantisedLinear):
        return layer.product_backward(gradient)
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return gradient @ weight.to(gradient.dtype)


def quantise(llm: nn.Module, kind: str, device: torch.device) -> nn.Module:
    """Replace the linear layers of `llm` (on the CPU) by ones of `kind` (int8 or int4) on `device`, one at a time."""
    for name, linear in linears(llm).items():
        llm.set_submodule(name, LAYERS[kind].of(linear.to(device)))
    return llm.to(device)


def quantise_meta(llm: nn.Module, kind: str) -> nn.Module:
    """Replace the linear layers of `llm`, on the meta device, by ones with the shapes and types that `kind` stores."""
    for name, linear in linears(llm).items():
        rows, columns = linear.weight.shape
        if kind == "int8":
            shape, dtype = (rows, columns), torch.int8
            scale_shape, scale_dtype = (rows,), linear.weight.dtype
        elif kind == "int4":
            shape, dtype = (rows, columns // 2), torch.uint8
            scale_shape, scale_dtype = (columns // INT4_GROUP, rows, 2), torch.bfloat16
        else:  # nf4
            shape, dtype = (rows * columns // 2, 1), torch.uint8
            scale_shape, scale_dtype = (rows * columns // NF4_GROUP,), torch.float32
        weight = torch.empty(shape, dtype=dtype, device="meta")
        scale = torch.empty(scale_shape, dtype=scale_dtype, device="meta")
        layer = LAYERS[kind](weight, scale, linear.bias)
        layer.shape = (rows, columns)
        llm.set_submodule(name, layer)
    return llm
