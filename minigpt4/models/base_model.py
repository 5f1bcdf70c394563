"""What every model here has: a device, one place to freeze, one autocast decision, a table of its parts."""

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
WEIGHTS_IN = {torch.uint8: 2, torch.int32: 8}  # weights in one element of a tensor of 4-bit weights


class Part(NamedTuple):
    """One row of the table of parts; `dtype` and `device` are text, several types joined by "/"."""

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

    PRETRAINED_MODEL_CONFIG_DICT = {}  # model_type -> YAML file, its path absolute or from the package's folder
    compute_dtype = torch.float32
    frozen = ()  # names of the parts that never train
    tokens_read = 0  # positions that the LLM has read so far, text and image, without padding; 0 if nobody counts

    @classmethod
    def text_preview(cls, cfg: Any) -> Any:
        """Return what shows the texts of samples as this model would read them, without weights.

        It has `prompts`, `lengths(samples)` and `tokens(sample, seed)`, as preview.TextPreview.
        """
        raise NotImplementedError(f"{cls.__name__}.text_preview")

    @classmethod
    def weight_files(cls, cfg: Any) -> list[Path]:
        """Return the files and folders that `from_config` will read, in that order."""
        return []

    @classmethod
    def preflight(cls, cfg: Any, where: str) -> list[Problem]:
        """Return what is wrong with the section `where` and the files that it names; nothing is loaded."""
        return []

    @classmethod
    def refusal_to_shard(cls, cfg: Any) -> str | None:
        """Return why the LLM of a section cannot be divided among ranks, None if it can."""
        return f"{cls.__name__} does not divide its LLM among ranks; set run.shard_llm=False"

    @classmethod
    def image_format(cls, cfg: Any) -> ImageFormat | None:
        """Return the pixels that a model of this section takes; None leaves it to the processors."""
        return None

    @classmethod
    def settle(cls, cfg: Any) -> None:
        """Fill in what a section leaves to its files. Raises ValueError, OSError if those are wrong."""
        if cfg.get("image_size", 0) is None and (image_format := cls.image_format(cfg)):
            cfg.image_size = image_format.size

    @classmethod
    def settle_training(cls, cfg: Any, device: torch.device, shard_llm: bool) -> None:
        """Fill in what a section leaves to the machine, for a training on `device`; `shard_llm`: of a divided LLM."""

    def split(self, samples: dict, max_tokens: int) -> list[tuple[dict, float]]:
        """Return [(part of a batch, what its loss counts in the batch's)], parts of at most `max_tokens` tokens."""
        raise NotImplementedError(f"{type(self).__name__}.split")

    def in_turns(self) -> AbstractContextManager:
        """Return a context within which ranks may run the model unequally often, without backward."""
        return nullcontext()

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    def freeze(self, *names: str) -> None:
        """Freeze the named parts and parameters, for good: `train()` leaves them in evaluation mode."""
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
        """Return the context of its computations: autocast to `compute_dtype`, none for float32 and float64."""
        if self.compute_dtype not in (torch.float16, torch.bfloat16):
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def part_of(self, name: str) -> str | None:
        """Return which part of `run.lr` a parameter belongs to, by its name; None: `run.init_lr` is its rate."""
        return None

    def identity(self) -> dict:
        """Return what the trained weights belong to, as plain values: a checkpoint carries it."""
        return {}

    def warnings(self) -> list[str]:
        """Return what a training should be told of this model's settings when it starts."""
        return []

    def parts(self) -> list[Part]:
        """Return the parts in the order of construction."""
        return [
            _row(*part) for part in [*self.named_parameters(recurse=False), *self.named_children()]
        ]


def _row(name: str, part: nn.Module | nn.Parameter) -> Part:
    parameters = list(part.parameters()) if isinstance(part, nn.Module) else [part]

    def texts(values):
        return "/".join(sorted({str(value).removeprefix("torch.") for value in values}))

    scales = part.named_buffers() if isinstance(part, nn.Module) else ()
    scales = [buffer for name, buffer in scales if name.endswith(".scale")]
    scales += [
        state.absmax
        for parameter in parameters
        if (state := getattr(parameter, "quant_state", None))
    ]
    return Part(
        name=name,
        parameters=sum(
            parameter.numel() * WEIGHTS_IN.get(parameter.dtype, 1) for parameter in parameters
        ),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        dtype=texts(parameter.dtype for parameter in parameters),
        bytes=sum(tensor.nbytes for tensor in [*parameters, *scales]),
        device=texts(parameter.device for parameter in parameters),
    )


def resolve_compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the torch.dtype of `auto | fp16 | bf16 | fp32` on `device`.

    auto: float16 on a GPU; on a CPU bfloat16 where the processor has instructions for it, else float32.
    """
    if precision != "auto":
        return DTYPES[precision]
    if device.type != "cpu":
        return torch.float16
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return (
        torch.bfloat16
        if any(getattr(torch.cpu, probe, bool)() for probe in probes)
        else torch.float32
    )
