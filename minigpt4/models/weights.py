"""Weight files: read without running code, match names and shapes strictly, read dimensions from a JSON sidecar.

A file must hold every tensor that the model needs from it, in the right shape. Tensors beyond these must match a
pattern of the tables below, and are reported in one log line; any others are an error that names both sides.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from minigpt4.common.checkpoint import CheckpointError, check_sums, check_weights, load_pickle

Tensors = dict[str, torch.Tensor]
Dimensions = TypeVar("Dimensions")  # a dataclass, such as EvaVit

# Tensors that files may hold in excess: (pattern of the whole name, why they are not used).
VIT_EXCESS = (
    (r"norm\.\w+|fc_norm\.\w+", "norm after the last block"),
    (r"head\.\w+", "head of the pretraining task"),
)
QFORMER_EXCESS = (
    (r"Qformer\.bert\.embeddings\.position_ids", "constant of 2023's text embeddings"),
    (r"Qformer\.bert\.embeddings\.(word|position)_embeddings\.weight", "text branch"),
    (r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..+", "text branch"),
    (r"Qformer\.cls\..+", "text head"),
    (r"(t5|opt|vision|text)_proj\..+|itm_head\..+|temp", "parts of BLIP-2 that have no use here"),
    (r"visual_encoder\..+", "the ViT comes from model.vit_ckpt"),
)
CHECKPOINT_EXCESS = (
    (r"Qformer\.bert\.embeddings\.position_ids", "constant of 2023's text embeddings"),
    (
        r"llama_model\.(base_model\.model\.)?model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        "constant of LLaMA",
    ),
)

# Real weights are far smaller; a flipped bit in the upper exponent multiplies a number by 2^32 or more.
_LARGEST_WEIGHT = 1e8
# Limits of a sidecar, in bytes and of its values: larger dimensions would cost minutes and memory before they fail.
_LARGEST_SIDECAR = 2**16
_MOST_LAYERS, _LARGEST_DIMENSION = 1000, 10**5


def last_block_excess(depth: int) -> tuple:
    """Return VIT_EXCESS plus the block after the `depth` used ones. Source: BLIP-2 uses the penultimate block."""
    return ((rf"blocks\.{depth}\..+", "last block (the one before it is used)"), *VIT_EXCESS)


def read_file(path: Path, where: str) -> Any:
    """Return the content of a .pth or .safetensors file, with tensors on the CPU, memory-mapped and not yet read.

    `where` is the configuration key that messages name. Raises CheckpointError if the file is damaged, would run code,
    or is something else, such as a web page.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path, where)
    state = load_pickle(
        path, where, "Use the released file, or save its state dict alone", mmap=True
    )
    check_sums(path, where, "Copy or download it again")
    return state


def read_tensors(path: Path, where: str, root: str | None = None) -> Tensors:
    """Return {name: tensor} of a file. Raises as `read_file` and `tensors_of`."""
    return tensors_of(read_file(path, where), path, where, root)


def tensors_of(state: Any, path: Path, where: str, root: str | None = None) -> Tensors:
    """Return {name: tensor} of a file's content `state`, or of what it has under the key `root`, if it has that.

    Raises CheckpointError if the content is anything but names and tensors.
    """
    if root is not None and isinstance(state, dict) and isinstance(state.get(root), dict):
        state = state[root]
    wrong = _not_weights(state)
    if wrong:
        expected = "names and tensors" + (f", below the key '{root}'" if root else "")
        raise CheckpointError(
            f"{where}: '{path}' is no file of weights ({wrong}); expected {expected}"
        )
    return state


def _not_weights(state: Any) -> str | None:
    """Return the first thing that makes `state` no dict of names and tensors, None if it is one."""
    if not isinstance(state, dict):
        return f"a {type(state).__name__}"
    for key, value in state.items():
        if not _is_weight(key, value):
            return f"'{key!s:.80}' in it is a {type(value).__name__}"
    return None


def _is_weight(name: Any, value: Any) -> bool:
    """Whether these are a name and a plain tensor: not sparse, quantised, complex or on the meta device."""
    is_plain = (
        torch.is_tensor(value) and value.layout == torch.strided and value.device.type == "cpu"
    )
    return is_plain and isinstance(name, str) and not (value.is_quantized or value.is_complex())


def _read_safetensors(path, where):
    from safetensors.torch import load_file

    check_weights(path, where)
    try:
        return load_file(path)
    except MemoryError:
        raise
    except Exception as error:  # SafetensorError, and others for types that torch does not have
        raise CheckpointError(
            f"{where}: '{path}' is damaged or no safetensors file ({error!s:.200}); use another one"
        ) from None


def match(
    found: Tensors,
    expected: Tensors,
    where: str,
    path: Path | str,
    excess: Sequence[tuple[str, str]] = (),
    optional: Tensors | None = None,
    hint: str = "",
) -> Tensors:
    """Return {name: tensor} of `found` for all names in `expected`, and those names in `optional` that are present.

    `expected`, `optional`: {name: tensor of the wanted shape}. `excess`: (pattern, reason) of tensors to leave out.
    Raises CheckpointError that lists all missing and unknown tensors and those of another shape, and ends in `hint`.
    """
    known = {**(optional or {}), **expected}
    shapes = {name: list(tensor.shape) for name, tensor in found.items()}
    missing, reshaped = [], []
    for name, tensor in known.items():
        shape = list(tensor.shape)
        if name not in found and name in expected:
            missing.append(f"{name} {shape}")
        elif shapes.get(name, shape) != shape:
            reshaped.append(f"{name} is {shapes[name]}, expected {shape}")
    # the remaining tensors: each either has a known reason to be there, or is an error
    left_over = [name for name in found if name not in known]
    reasons = {name: _reason(name, excess) for name in left_over}
    unknown = [f"{name} {shapes[name]}" for name in left_over if reasons[name] is None]
    # one message with everything that is wrong
    if missing or reshaped or unknown:
        kinds = {"missing": missing, "of another shape": reshaped, "unknown": unknown}
        problems = "; ".join(_listed(kind, names) for kind, names in kinds.items() if names)
        advice = _advice(found) or hint
        raise CheckpointError(
            f"{where}: '{path}' does not fit: {problems}" + (f". {advice}" if advice else "")
        )
    if left_over:
        why = "; ".join(dict.fromkeys(reasons.values()))
        logging.info("%s: %d tensors of '%s' are not used: %s", where, len(left_over), path, why)
    return {name: found[name] for name in known if name in found}


def _reason(name: str, excess: Sequence[tuple[str, str]]) -> str | None:
    """Return why a tensor is not used, None if no pattern of `excess` matches it."""
    return next((reason for pattern, reason in excess if re.fullmatch(pattern, name)), None)


def check_finite(found: Tensors, where: str, path: Path | str) -> None:
    """Raise CheckpointError if tensors have numbers that no training produces; the message names these tensors.

    Such numbers are not finite, or so large that a flipped bit must have caused them.
    """
    bad, wrong = [], f"above {_LARGEST_WEIGHT:.0e}"
    for name, tensor in found.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor.detach())  # several times faster than isfinite
            if not (low > -_LARGEST_WEIGHT and high < _LARGEST_WEIGHT):
                bad.append(name)
            if not (low.isfinite() and high.isfinite()):
                wrong = "that are not finite"
    if bad:
        raise CheckpointError(
            f"{where}: '{path}' holds numbers {wrong}: {_listed('bad', bad)}. The training that wrote it had failed, "
            "or the file is damaged; use an earlier checkpoint"
        )


def assign(module: nn.Module, found: Tensors) -> None:
    """Replace the module's tensors of these names, converted to the types of the old ones; equal types are not copied."""
    own = module.state_dict()
    converted = {name: tensor.to(own[name].dtype) for name, tensor in found.items()}
    module.load_state_dict(converted, strict=False, assign=True)


def _listed(what, items, limit=3):
    """Return e.g. "5 tensors are missing (a, b, c, ..)"."""
    number = "1 tensor is" if len(items) == 1 else f"{len(items)} tensors are"
    names = ", ".join(f"{item:.200}" for item in items[:limit])
    return f"{number} {what} ({names}{', ..' if len(items) > limit else ''})"


def _advice(found):
    """Return advice for a common mistake that the names in `found` show, None if they show none."""
    if not found:
        return "The file is empty"
    if all(name.startswith("module.") for name in found):
        return "Its names begin with 'module.': it was saved from a wrapped model; save model.module.state_dict()"
    return None


def dimensions(path: Path, standard: Dimensions, where: str) -> Dimensions:
    """Return the dimensions of a weight file: those in its sidecar, a JSON file of the same stem, else `standard`.

    Raises CheckpointError for a sidecar with unknown, missing or unusable fields.
    """
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return standard
    names = [field.name for field in dataclasses.fields(standard)]
    optional = getattr(standard, "OPTIONAL", ())
    needed = [name for name in names if name not in optional]
    try:
        size = sidecar.stat().st_size
        if size > _LARGEST_SIDECAR:
            raise ValueError(f"{size:,} bytes")
        values = json.loads(sidecar.read_text(encoding="utf-8"))
        # of `needed`, a missing one is a KeyError; `type`, as a bool is an int, too
        is_usable = all(
            type(values[name]) is int and values[name] > 0 for name in (*needed, *values)
        )
        if not is_usable or not set(names).issuperset(values):
            raise ValueError("unknown or unusable fields")
        for name, value in values.items():
            counts_layers = name == "depth" or name.endswith("_layers")
            if value > (_MOST_LAYERS if counts_layers else _LARGEST_DIMENSION):
                raise ValueError(f"{name} {value:,}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: '{sidecar}', which gives the dimensions of '{path.name}', is not usable ({error}); expected a "
            f"JSON object of whole numbers with {', '.join(needed)}"
        ) from None
    return type(standard)(**values)
