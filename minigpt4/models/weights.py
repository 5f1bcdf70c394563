"""Weight files: reading without running code, strict matching of names and shapes, sidecars with dimensions.

A source file must hold every tensor that the model needs of it, of the right shape. What it holds beyond that must
match a pattern of the tables below, and is reported once; anything else is an error that names both sides.
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

# What files may hold in excess: (pattern of the whole name, why it is not used).
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


# Weights are far below; a flipped bit of an exponent multiplies by 2^32 or more, or by little.
_LARGEST = 1e8
# What a sidecar can ask for: more would only take minutes and memory before it fails.
_LARGEST_SIDECAR = 2**16
_MOST_LAYERS, _MOST = 1000, 10**5


def last_block_excess(depth: int) -> tuple:
    """Return VIT_EXCESS and the block that follows the `depth` used ones (Source: BLIP-2 takes the penultimate)."""
    return ((rf"blocks\.{depth}\..+", "last block (the one before it is used)"), *VIT_EXCESS)


def read_file(path: Path, where: str) -> Any:
    """Return what a .pth or .safetensors file holds, tensors on the CPU, mapped into memory and not yet read.

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
    """Return the {name: tensor} of `read_file`. Raises as it and `tensors_of`."""
    return tensors_of(read_file(path, where), path, where, root)


def tensors_of(state: Any, path: Path, where: str, root: str | None = None) -> Tensors:
    """Return the {name: tensor} in what a file holds, in a .pth file below the key `root`, if it has that.

    Raises CheckpointError if it holds something else.
    """
    if root is not None and isinstance(state, dict) and isinstance(state.get(root), dict):
        state = state[root]
    # what stands in it that is no weight
    found = "" if isinstance(state, dict) else f"a {type(state).__name__}"
    for key in () if found else state:
        if not _is_weight(key, state[key]):
            found = f"'{key!s:.80}' in it is a {type(state[key]).__name__}"
            break
    if found:
        expected = "names and tensors" + (f", below the key '{root}'" if root else "")
        raise CheckpointError(
            f"{where}: '{path}' is no file of weights ({found}); expected {expected}"
        )
    return state


def _is_weight(name: Any, value: Any) -> bool:
    """Whether that is a name and a plain tensor: not sparse, quantised, complex, or without numbers."""
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
    """Return {name: tensor} of `found` for all names of `expected`, and those of `optional` that are there.

    `expected`, `optional`: {name: tensor of the wanted shape}. `excess`: (pattern, reason) of what may be left over.
    Raises CheckpointError that lists what is missing, unknown or of another shape.
    """
    known = {**(optional or {}), **expected}
    shapes = {name: list(tensor.shape) for name, tensor in found.items()}
    # what is wanted, and what is there
    missing, reshaped = [], []
    for name, tensor in known.items():
        shape = list(tensor.shape)
        if name not in found and name in expected:
            missing.append(f"{name} {shape}")
        elif shapes.get(name, shape) != shape:
            reshaped.append(f"{name} is {shapes[name]}, expected {shape}")
    # what is there beyond it
    left_over = [name for name in found if name not in known]
    reasons = {name: _reason(name, excess) for name in left_over}
    unknown = [f"{name} {shapes[name]}" for name in left_over if reasons[name] is None]
    # all that is wrong in one message
    if missing or reshaped or unknown:
        kinds = {"missing": missing, "of another shape": reshaped, "unknown": unknown}
        problems = "; ".join(filter(None, map(_listed, kinds, kinds.values())))
        advice = _advice(found) or hint
        raise CheckpointError(
            f"{where}: '{path}' does not fit: {problems}" + (f". {advice}" if advice else "")
        )
    if left_over:
        kinds = "; ".join(dict.fromkeys(reasons.values()))
        logging.info("%s: %d tensors of '%s' are not used: %s", where, len(left_over), path, kinds)
    return {name: found[name] for name in known if name in found}


def _reason(name: str, excess: Sequence[tuple[str, str]]) -> str | None:
    """Return why a tensor may be left over, None if it may not."""
    return next((reason for pattern, reason in excess if re.fullmatch(pattern, name)), None)


def check_finite(found: Tensors, where: str, path: Path | str) -> None:
    """Raise CheckpointError that names the tensors of `found` with numbers that no training leaves behind, if any.

    They are not finite, or so large that a flipped bit made them.
    """
    bad, wrong = [], f"above {_LARGEST:.0e}"
    for name, tensor in found.items():
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor.detach())  # several times faster than isfinite
            if not (low > -_LARGEST and high < _LARGEST):
                bad.append(name)
            if not (low.isfinite() and high.isfinite()):
                wrong = "that are not finite"
    if bad:
        raise CheckpointError(
            f"{where}: '{path}' holds numbers {wrong}: {_listed('bad', bad)}. The training that wrote it had failed, "
            "or the file is damaged; use an earlier checkpoint"
        )


def assign(module: nn.Module, found: Tensors) -> None:
    """Put tensors in the place of the module's own, in the type of those; equal types are not copied."""
    own = module.state_dict()
    named = {name: tensor.to(own[name].dtype) for name, tensor in found.items()}
    module.load_state_dict(named, strict=False, assign=True)


def _listed(what, items, limit=3):
    """Return "5 tensors are missing (a, b, c, ..)", or nothing for none."""
    if not items:
        return ""
    number = "1 tensor is" if len(items) == 1 else f"{len(items)} tensors are"
    names = ", ".join(f"{item:.200}" for item in items[:limit])
    return f"{number} {what} ({names}{', ..' if len(items) > limit else ''})"


def _advice(found):
    if not found:
        return "The file is empty"
    if all(name.startswith("module.") for name in found):
        return "Its names begin with 'module.': it was saved from a wrapped model; save model.module.state_dict()"
    return None


def dimensions(path: Path, standard: Dimensions, where: str) -> Dimensions:
    """Return the dimensions of a weight file: those of the JSON file beside it, of the same stem, else `standard`.

    Raises CheckpointError for a sidecar with unknown or missing fields.
    """
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return standard
    names = {field.name for field in dataclasses.fields(standard)}
    optional = getattr(standard, "OPTIONAL", ())
    needed = [field.name for field in dataclasses.fields(standard) if field.name not in optional]
    try:
        if sidecar.stat().st_size > _LARGEST_SIDECAR:
            raise ValueError(f"{sidecar.stat().st_size:,} bytes")
        values = json.loads(sidecar.read_text(encoding="utf-8"))
        is_usable = all(
            type(values[name]) is int and values[name] > 0 for name in (*needed, *values)
        )
        if not is_usable or not names.issuperset(values):
            raise ValueError("unknown or unusable fields")
        for name, value in values.items():
            if value > (_MOST_LAYERS if name == "depth" or name.endswith("_layers") else _MOST):
                raise ValueError(f"{name} {value:,}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: '{sidecar}', which gives the dimensions of '{path.name}', is not usable ({error}); expected a "
            f"JSON object of whole numbers with {', '.join(needed)}"
        ) from None
    return type(standard)(**values)
