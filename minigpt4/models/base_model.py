"""The base class of all models: freezing, autocast, the table of parts, and the interface that training uses."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from minigpt4.common.config import REQUIRED, Problem
from minigpt4.common.image_format import ImageFormat

# model.llm_precision
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# weights per element of a tensor that packs 4-bit weights
WEIGHTS_IN = {torch.uint8: 2, torch.int32: 8}


class Part(NamedTuple):
    """One row of the table of parts; `dtype` and `device` are text, several joined by "/"."""

    name: str
    parameters: int
    trainable: int
    dtype: str
    bytes: int
    device: str


class BaseModel(nn.Module):
    """A model with frozen parts that computes in `compute_dtype`."""

    @dataclass
    class Config:
        """The keys of the section `model`, with their defaults; a subclass adds its own."""

        arch: str = REQUIRED
        model_type: str | None = None

    PRETRAINED_MODEL_CONFIG_DICT = {}  # {model_type: YAML file, absolute or relative to the package's folder}
    compute_dtype = torch.float32
    frozen = ()  # names of the parts that never train
    tokens_read = 0  # positions that the LLM has read so far, text and image without padding; 0 if not counted

    @classmethod
    def text_preview(cls, cfg: Any) -> Any:
        """Return an object that shows the texts of samples as this model would read them; needs no weights.

        It has the interface of preview.TextPreview: `prompts`, `lengths(samples)` and `tokens(sample, seed)`.
        """
        raise NotImplementedError(f"{cls.__name__}.text_preview")

    @classmethod
    def weight_files(cls, cfg: Any) -> list[Path]:
        """Return the files and folders that `from_config` will read, in that order."""
        return []

    @classmethod
    def preflight(cls, cfg: Any, where: str) -> list[Problem]:
        """Return what is wrong with the section `where` and the files that it names; loads nothing."""
        return []

    @classmethod
    def refusal_to_shard(cls, cfg: Any) -> str | None:
        """Return why the LLM of a section cannot be sharded across ranks, None if it can."""
        return f"{cls.__name__} does not divide its LLM among ranks; set run.shard_llm=False"

    @classmethod
    def image_format(cls, cfg: Any) -> ImageFormat | None:
        """Return the image size and normalisation of a model of this section; None leaves them to the processors."""
        return None

    @classmethod
    def settle(cls, cfg: Any) -> None:
        """Fill in the keys whose values come from the model's files. Raises ValueError, OSError if those are wrong."""
        if cfg.get("image_size", 0) is None and (image_format := cls.image_format(cfg)):
            cfg.image_size = image_format.size

    @classmethod
    def settle_training(cls, cfg: Any, device: torch.device, shard_llm: bool) -> None:
        """Fill in the keys whose values depend on the machine, for a training on `device`; `shard_llm`: LLM sharded."""

    def split(self, samples: dict, max_tokens: int) -> list[tuple[dict, float]]:
        """Return [(part of a batch, its weight in the batch's loss)], parts of at most `max_tokens` tokens."""
        raise NotImplementedError(f"{type(self).__name__}.split")

    def in_turns(self) -> AbstractContextManager:
        """Return a context in which each rank may run the model any number of times, without backward."""
        return nullcontext()

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    def freeze(self, *names: str) -> None:
        """Freeze the named parts and parameters permanently: `train()` leaves them in evaluation mode."""
        self.frozen = (*self.frozen, *names)
        for name in names:
            getattr(self, name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "BaseModel":
        super().train(mode)
        for name in self.frozen:
            if isinstance(part := getattr(self, name), nn.Module):
                part.eval()
        return self

    def maybe_autocast(self) -> AbstractContextManager:
        """Return the context for the model's computations: autocast to `compute_dtype` if that is half precision."""
        if self.compute_dtype not in (torch.float16, torch.bfloat16):
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def part_of(self, name: str) -> str | None:
        """Return the part of `run.lr` that a parameter belongs to, by its name; None for the rate `run.init_lr`."""
        return None

    def identity(self) -> dict:
        """Return, as plain values, what the trained weights depend on; it is saved in checkpoints."""
        return {}

    def warnings(self) -> list[str]:
        """Return the warnings about this model's settings to log when a training starts."""
        return []

    def parts(self) -> list[Part]:
        """Return the parts in the order of construction."""
        return [
            _row(*part) for part in [*self.named_parameters(recurse=False), *self.named_children()]
        ]


def _row(name: str, part: nn.Module | nn.Parameter) -> Part:
    parameters = list(part.parameters()) if isinstance(part, nn.Module) else [part]
    sizes = [parameter.numel() * WEIGHTS_IN.get(parameter.dtype, 1) for parameter in parameters]
    # scales of quantised weights: a buffer of our own layers, an attribute of bitsandbytes' parameters
    buffers = part.named_buffers() if isinstance(part, nn.Module) else ()
    scales = [buffer for name, buffer in buffers if name.endswith(".scale")]
    for parameter in parameters:
        if state := getattr(parameter, "quant_state", None):
            scales.append(state.absmax)

    def joined(values):
        return "/".join(sorted({str(value).removeprefix("torch.") for value in values}))

    return Part(
        name=name,
        parameters=sum(sizes),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        dtype=joined(parameter.dtype for parameter in parameters),
        bytes=sum(tensor.nbytes for tensor in [*parameters, *scales]),
        device=joined(parameter.device for parameter in parameters),
    )


def resolve_compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the torch.dtype of `auto | fp16 | bf16 | fp32` on `device`.

    auto: float16 on a GPU; on a CPU bfloat16 where the processor has instructions for it, else float32.
    """
    if precision != "auto":
        return DTYPES[precision]
    if device.type != "cpu":
        return torch.float16
    # private functions of torch: one that a version lacks counts as unsupported, bool() being False
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    has_bfloat16 = any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return torch.bfloat16 if has_bfloat16 else torch.float32
