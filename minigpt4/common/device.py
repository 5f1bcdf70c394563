"""What `run.device`, `run.amp` and `run.amp_dtype` mean on this machine."""

import os
import re
import resource
import sys
from contextlib import contextmanager

import torch

AMP_DTYPES = {"auto": "auto", "float16": "fp16", "bfloat16": "bf16"}  # run.amp_dtype -> model.llm_precision


def resolve_device(name, local_rank=None, where="run.device"):
    """Return the torch.device for `auto | cpu | cuda | cuda:N | mps`.

    `local_rank`: index of this process among those of one machine, None if it is alone; "cuda" is then that GPU.
    Raises ValueError if the device is not there.
    """
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps and local_rank is None else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"{where}: '{name}' is no device; give auto, cpu, cuda, cuda:<index> or mps")
    if device.type == "mps" and not has_mps:
        raise ValueError(f"{where}: 'mps' but torch sees no Apple GPU; use --options {where}=cpu")
    return _cuda_device(device, local_rank, where) if device.type == "cuda" else device


def _cuda_device(device, local_rank, where):
    if not torch.cuda.is_available():
        raise ValueError(f"{where}: '{device}' but torch sees no GPU; use --options {where}=cpu")
    if device.index is not None and local_rank is not None:
        raise ValueError(f"{where}: '{device}' names one GPU for all processes; use 'cuda', each then takes its own")
    index = device.index if device.index is not None else local_rank or 0
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"{where}: GPU {index} is asked for but torch sees {torch.cuda.device_count()}; start at most one process "
            "per GPU, or name another GPU"
        )
    return torch.device("cuda", index)


def set_precision(model_cfg, run_cfg):
    """Write into the `model` section the `llm_precision` that the run asks for, unless the user chose one there."""
    if model_cfg.get("llm_precision") == "auto":
        model_cfg.llm_precision = AMP_DTYPES[run_cfg.amp_dtype] if run_cfg.amp else "fp32"


def build_scaler(model, amp, device):
    """Return a GradScaler, at work only where gradients need it: a run with `amp` that computes in float16 on CUDA."""
    is_needed = amp and device.type == "cuda" and model.compute_dtype == torch.float16
    return torch.amp.GradScaler(device.type, enabled=is_needed)


def to_device(batch, device):
    """Return `batch` with its tensors on `device`; copies from pinned memory do not block.

    This is where images that a loader left in uint8 become what the model takes: "normalise" is applied to "image".
    """
    batch = {
        key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for key, value in batch.items()
    }
    if normalise := batch.pop("normalise", None):
        batch["image"] = normalise(batch["image"])
    return batch


@contextmanager
def explained_out_of_memory(run_cfg):
    """Within the block a full GPU or a full machine is a MemoryError that says which settings help."""
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


def peak_memory_mib(device):
    """Return the most memory held so far, in MiB: of CUDA's allocator, elsewhere of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def total_memory_bytes(device):
    """Return the size of the device's memory; on the CPU that of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
