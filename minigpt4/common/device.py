"""The device and precision of a run (`run.device`, `run.amp`, `run.amp_dtype`), transfers to the device, memory."""

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

# Hold it to draw from torch's default generators, and to record a CUDA graph: a draw during a recording raises an error.
shared_generators = threading.Lock()


class DeviceError(ValueError):
    """A device that is not available; `problem` names the key that asks for it."""

    def __init__(self, key: str, message: str) -> None:
        self.problem = Problem(key, message)
        super().__init__(str(self.problem))

    def __reduce__(self) -> tuple:
        # for pickle, which would pass the message alone
        return type(self), (self.problem.key, self.problem.message)


def resolve_device(
    name: str, local_rank: int | None = None, where: str = "run.device"
) -> torch.device:
    """Return the torch.device for `auto | cpu | cuda | cuda:N | mps`, the value of the key `where`.

    `local_rank`: index of this process on its machine, None if it is alone; "cuda" is the GPU of that index.
    Raises DeviceError if the device is not available.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "mps" if has_mps and local_rank is None else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(
            where, f"'{name}' is no device; give auto, cpu, cuda, cuda:<index> or mps"
        )
    if device.type == "mps" and not has_mps:
        raise DeviceError(where, f"'mps' but torch sees no Apple GPU; use --options {where}=cpu")
    return _cuda_device(device, local_rank, where) if device.type == "cuda" else device


def _cuda_device(device: torch.device, local_rank: int | None, where: str) -> torch.device:
    """Return the GPU, with its index, of this process. Raises DeviceError if it is not available."""
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
    """Return `model.llm_precision` of a run: for "auto" that of `run.amp` and `run.amp_dtype`."""
    if precision != "auto":
        return precision
    return AMP_DTYPES[amp_dtype] if amp else "fp32"


def in_run_precision(model_cfg: DictConfig, run_cfg: DictConfig) -> DictConfig:
    """Return a copy of the `model` section whose `llm_precision`, if it has that key, is resolved by `run_precision`."""
    model_cfg = copy.deepcopy(model_cfg)
    if "llm_precision" in model_cfg:
        model_cfg.llm_precision = run_precision(
            model_cfg.llm_precision, run_cfg.amp, run_cfg.amp_dtype
        )
    return model_cfg


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return `batch` with its tensors on `device`; its function "normalise", if any, is applied to its uint8 images."""
    moved = {}
    for key, value in batch.items():
        moved[key] = value.to(device, non_blocking=True) if torch.is_tensor(value) else value
    if normalise := moved.pop("normalise", None):
        moved["image"] = normalise(moved["image"])
    return moved


def send(*lists: Sequence[int], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return lists of integers as int64 tensors on `device`, sent in one asynchronous copy."""
    flat = torch.tensor(list(itertools.chain(*lists)), dtype=torch.long)
    is_plain = flat.is_cpu and type(flat) is torch.Tensor
    if is_plain and device.type == "cuda" and torch.cuda.is_available():
        flat = flat.pin_memory()  # a copy from pageable memory may wait for the device
    return flat.to(device, non_blocking=True).split(list(map(len, lists)))


@contextmanager
def explained_out_of_memory(run_cfg: DictConfig) -> Iterator[None]:
    """Within the block, turn running out of memory into a MemoryError that says which settings help."""
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
    """Return the peak memory so far in MiB: of CUDA's allocator, on other devices of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    units_per_mib = 2**20 if sys.platform == "darwin" else 2**10  # bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_mib


def total_memory_bytes(device: torch.device) -> int:
    """Return the size of the device's memory; for the CPU that of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
