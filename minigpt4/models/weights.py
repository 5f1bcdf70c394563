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
from typing import TypeVar

import torch
from torch import nn

from minigpt4.common.checkpoint import CheckpointError, load_pickle
from minigpt4.common.utils import check_not_html

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
    (r"llama_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "constant of 2023's LLaMA"),
)


# What an LLM of a certain width usually is, for messages.
_LLM_SIZES = {4096: " (7B)", 5120: " (13B)"}


def last_block_excess(depth: int) -> tuple:
    """Return VIT_EXCESS and the block that follows the `depth` used ones (Source: BLIP-2 takes the penultimate)."""
    return ((rf"blocks\.{depth}\..+", "last block (the one before it is used)"), *VIT_EXCESS)


def read_tensors(path: Path, where: str, root: str | None = None) -> dict[str, torch.Tensor]:
    """Return {name: tensor on the CPU} of a .pth or .safetensors file, mapped into memory and not yet read.

    `root`: key below which a .pth file holds the tensors. `where` is the configuration key that messages name.
    Raises CheckpointError if the file is damaged, would run code, or holds something else; ValueError for a web page.
    """
    if path.suffix == ".safetensors":
        state = _read_safetensors(path, where)
    else:
        state = load_pickle(path, where, "Use the released file, or save its state dict alone", mmap=True)
    if root is not None and isinstance(state, dict) and isinstance(state.get(root), dict):
        state = state[root]
    others = [key for key, value in state.items() if not torch.is_tensor(value)] if isinstance(state, dict) else None
    if others is None or others:
        found = f"'{others[0]}' in it is a {type(state[others[0]]).__name__}" if others else f"a {type(state).__name__}"
        expected = "names and tensors" + (f", below the key '{root}'" if root else "")
        raise CheckpointError(f"{where}: '{path}' is no file of weights ({found}); expected {expected}")
    return state


def _read_safetensors(path, where):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_not_html(path, where)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"{where}: '{path}' is damaged or no safetensors file ({error}); use another one"
        ) from None


def compare_llm(path: Path, where: str, own: dict) -> None:
    """Warn where a checkpoint says that it was trained with another LLM than `own`, of `language_model.identity`."""
    saved = load_pickle(path, where, "", mmap=True) if path.suffix != ".safetensors" else {}
    theirs = saved.get("progress", {}).get("identity", {}).get("llm")
    if theirs and theirs["fingerprint"] != own["fingerprint"]:
        logging.warning(
            "%s: '%s' was trained with another LLM (%s) than model.llama_model (%s); what it says may be worse, or "
            "nonsense",
            where,
            path,
            ", ".join(f"{key} {value}" for key, value in theirs.items()),
            ", ".join(f"{key} {value}" for key, value in own.items()),
        )


def trained_text(path: Path, where: str) -> tuple[str, str] | None:
    """Return (prompt_template, end_sym) with which a checkpoint says that it was trained; None if it names none."""
    saved = load_pickle(path, where, "", mmap=True) if path.suffix != ".safetensors" else {}
    for keys in (("progress", "identity"), ("config", "model")):  # ours, and what 2023's trainer saved, too
        found = saved
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        if isinstance(found, dict) and "{}" in str(found.get("prompt_template")):
            return str(found["prompt_template"]), str(found.get("end_sym", "\n"))
    return None


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
    wrong = [
        _listed("missing", [f"{name} {list(expected[name].shape)}" for name in expected if name not in found]),
        _listed(
            "of another shape",
            [
                f"{name} is {list(found[name].shape)}, expected {list(known[name].shape)}"
                for name in known
                if name in found and found[name].shape != known[name].shape
            ],
        ),
    ]
    left_over = [name for name in found if name not in known]
    reasons = {name: _reason(name, excess) for name in left_over}
    wrong.append(_listed("unknown", [f"{n} {list(found[n].shape)}" for n, why in reasons.items() if why is None]))
    if any(wrong):
        advice = _advice(found) or hint
        problems = "; ".join(filter(None, wrong))
        raise CheckpointError(f"{where}: '{path}' does not fit: {problems}" + (f". {advice}" if advice else ""))
    if left_over:
        kinds = "; ".join(dict.fromkeys(reasons.values()))
        logging.info("%s: %d tensors of '%s' are not used: %s", where, len(left_over), path, kinds)
    return {name: found[name] for name in known if name in found}


def _reason(name: str, excess: Sequence[tuple[str, str]]) -> str | None:
    """Return why a tensor may be left over, None if it may not."""
    return next((reason for pattern, reason in excess if re.fullmatch(pattern, name)), None)


def check_width(state: Tensors, own: torch.Tensor, where: str, path: Path | str) -> None:
    """Raise CheckpointError if a checkpoint's llama_proj is of an LLM of another width than `own`."""
    found = state.get("llama_proj.weight")
    if found is not None and found.ndim == 2 and len(found) != len(own):
        theirs, ours = len(found), len(own)
        raise CheckpointError(
            f"{where}: '{path}' was trained for a {theirs}-wide LLM{_LLM_SIZES.get(theirs, '')}, model.llama_model "
            f"is {ours} wide{_LLM_SIZES.get(ours, '')}; give a checkpoint and an LLM of one size"
        )


def check_finite(found: Tensors, where: str, path: Path | str) -> None:
    """Raise CheckpointError that names the tensors of `found` with numbers that are nan or infinite, if any."""
    bad = [name for name, tensor in found.items() if not tensor.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{where}: '{path}' holds numbers that are not finite: {_listed('bad', bad)}. The training that wrote it "
            "had failed, or the file is damaged; use an earlier checkpoint"
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
    return f"{number} {what} ({', '.join(items[:limit])}{', ..' if len(items) > limit else ''})"


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
        values = json.loads(sidecar.read_text(encoding="utf-8"))
        is_usable = all(type(values[name]) is int and values[name] > 0 for name in (*needed, *values))
        if not is_usable or not names.issuperset(values):
            raise ValueError("unknown or unusable fields")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{where}: '{sidecar}', which gives the dimensions of '{path.name}', is not usable ({error}); expected a "
            f"JSON object of whole numbers with {', '.join(needed)}"
        ) from None
    return type(standard)(**values)
