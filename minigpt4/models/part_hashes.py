"""Hashes of a model's parts as they are in memory: of every byte, not of a sample."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

_MOST_THREADS = 8  # each holds a copy of a tensor that lies on a GPU


def frozen_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return {name: tensor} of the parameters that do not train, and of the buffers.

    Of an LLM that is divided among ranks, this rank's shares: a part of its own, `llama_model (1 of 2 shares)`.
    """
    frozen = {}
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "to_local"):  # torch's DTensor
            name = name.replace(".", f" (1 of {parameter.device_mesh.size()} shares).", 1)
            parameter = parameter.to_local()
        if not parameter.requires_grad:
            frozen[name] = parameter
    return frozen | dict(_saved_buffers(model))


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers that are saved with a model; the others are made from its settings, or are caches."""
    for where, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{where}.{name}".lstrip("."), buffer


def tensor_hashes(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return {name: hash} of tensors, of their types, shapes and bytes. sha256 leaves Python to the other threads."""
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(tensor_hash, tensors.values()), strict=True))


def tensor_hash(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's type, shape and bytes."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {list(plain.shape)} ".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def part_hashes(hashes: Mapping[str, str]) -> dict[str, str]:
    """Return {part: hash of its tensors' names and hashes}; a part is what stands before the first dot of a name."""
    digests = defaultdict(hashlib.sha256)
    for name in sorted(hashes):
        digests[name.partition(".")[0]].update(f"{name} {hashes[name]}\n".encode())
    return {part: digest.hexdigest() for part, digest in sorted(digests.items())}
