"""Hashes of a model's parts in memory, of every byte (those of files, in fingerprints.py, sample)."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

_MOST_THREADS = 8  # each holds a CPU copy of one tensor of a GPU


def frozen_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return {name: tensor} of the frozen parameters and the saved buffers.

    Of a sharded LLM these are this rank's shards, under a part name of their own: `llama_model (1 of 2 shares)`.
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
    """Yield (name, buffer) of the persistent buffers; the others follow from the model's settings, or are caches."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), buffer


def tensor_hashes(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return {name: `tensor_hash`} of tensors, computed in threads: sha256 releases Python's global lock."""
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(tensor_hash, tensors.values()), strict=True))


def tensor_hash(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's type, shape and bytes."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {list(plain.shape)} ".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def part_hashes(hashes: Mapping[str, str]) -> dict[str, str]:
    """Return {part: hash of its tensors' names and hashes}; the part is the text before a name's first dot."""
    digests = defaultdict(hashlib.sha256)
    for name in sorted(hashes):
        digests[name.partition(".")[0]].update(f"{name} {hashes[name]}\n".encode())
    return {part: digest.hexdigest() for part, digest in sorted(digests.items())}
