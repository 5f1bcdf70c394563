"""What `run.device`, `run.amp` and `run.amp_dtype` mean on this machine."""

import copy
import itertools
import os
import re
import resource
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from omegaconf import DictConfig

from minigpt4.common.config import Problem

# run.amp_dtype -> model.llm_precision
AMP_DTYPES = {"auto": "auto", "float16": "fp16", "bfloat16": "bf16"}

# Held by who draws from torch's own generators, and by who records a CUDA graph: a draw meanwhile ends in an error.
shared_generators = threading.Lock()


class DeviceError(ValueError):
    """A device that is not there; `problem` names the key that asks for it."""

    def __init__(self, key: str, message: str) -> None:
        self.problem = Problem(key, message)
        super().__init__(str(self.problem))


def resolve_device(
    name: str, local_rank: int | None = None, where: str = "run.device"
) -> torch.device:
    """Return the torch.device for `auto | cpu | cuda | cuda:N | mps`, the value of the key `where`.

    `local_rank`: index of this process on its machine, None if it is alone; "cuda" is that GPU.
    Raises DeviceError if the device is not there.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if has_mps and local_rank is None
            else "cpu"
        )
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(
            where, f"'{name}' is no device; give auto, cpu, cuda, cuda:<index> or mps"
        )
    if device.type == "mps" and not has_mps:
        raise DeviceError(where, f"'mps' but torch sees no Apple GPU; use --options {where}=cpu")
    return _cuda_device(device, local_rank, where) if device.type == "cuda" else device


def _cuda_device(device: torch.device, local_rank: int | None, where: str) -> torch.device:
    if not torch.cuda.is_available():
        raise DeviceError(where, f"'{device}' but torch sees no GPU; use --options {where}=cpu")
    if device.index is not None and local_rank is not None:
        raise DeviceError(
            where,
            f"'{device}' names one GPU for all processes; use 'cuda', each then takes its own",
        )
    index = device.index if device.index is not None else local_rank or 0
    if index >= (count := torch.cuda.device_count()):
        hint = "start at most one process per GPU, or name another GPU"
        raise DeviceError(where, f"GPU {index} is asked for but torch sees {count}; {hint}")
    return torch.device("cuda", index)


def run_precision(precision: str, amp: bool, amp_dtype: str) -> str:
    """Return `model.llm_precision` of a run: "auto" is what `run.amp` and `run.amp_dtype` say."""
    of_run = AMP_DTYPES[amp_dtype] if amp else "fp32"
    return of_run if precision == "auto" else precision


def in_run_precision(model_cfg: DictConfig, run_cfg: DictConfig) -> DictConfig:
    """Return a copy of the `model` section whose `llm_precision`, if any, is the run's."""
    model_cfg = copy.deepcopy(model_cfg)
    if "llm_precision" in model_cfg:
        model_cfg.llm_precision = run_precision(
            model_cfg.llm_precision, run_cfg.amp, run_cfg.amp_dtype
        )
    return model_cfg


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return `batch` with its tensors on `device`, and "normalise" applied to images left in uint8."""
    moved = {}
    for key, value in batch.items():
        moved[key] = value.to(device, non_blocking=True) if torch.is_tensor(value) else value
    if normalise := moved.pop("normalise", None):
        moved["image"] = normalise(moved["image"])
    return moved


def send(*lists: Sequence[int], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return lists of integers as int64 tensors on `device`: one copy of all of them, which nothing waits for."""
    flat = torch.tensor(list(itertools.chain(*lists)), dtype=torch.long)
    if (
        flat.is_cpu
        and device.type == "cuda"
        and torch.cuda.is_available()
        and type(flat) is torch.Tensor
    ):
        flat = flat.pin_memory()  # from other memory the driver may wait
    return flat.to(device, non_blocking=True).split(list(map(len, lists)))


@contextmanager
def explained_out_of_memory(run_cfg: DictConfig) -> Iterator[None]:
    """Within the block, running out of memory is a MemoryError that says which settings help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            full = f"the GPU is full ({str(error).split('. ')[0]})"
        elif isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            wanted = re.search(r"tried to allocate \d+ bytes", str(error))
            full = f"the memory of the machine is full{f' ({wanted[0]})' if wanted else ''}"
        else:
            raise
        raise MemoryError(
            f"{full}. What helps: a smaller run.batch_size_train (now {run_cfg.batch_size_train}) with a larger "
            f"run.accum_grad_iters (now {run_cfg.accum_grad_iters}), the LLM in 8 or 4 bits "
            "(model.llm_quantization=int8 or nf4), model.llm_checkpointing=True, shorter texts (model.max_txt_len), "
            "and, where the ViT trains, model.use_grad_checkpoint=True; train.py --dry-run counts the memory of each"
        ) from error


def peak_memory_mib(device: torch.device) -> float:
    """Return the most memory held so far, in MiB: by CUDA's allocator, elsewhere by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


def total_memory_bytes(device: torch.device) -> int:
    """Return the size of the device's memory; on the CPU that of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
