"""The identity of the model that a checkpoint was trained with: its parts, their files, its prompt template."""

import logging
from pathlib import Path
from typing import Any

from minigpt4.common.checkpoint import CheckpointError
from minigpt4.common.utils import fingerprint

# {part of a model's composition: (key that sets it, why a checkpoint does not fit another one)}
_PARTS = {
    "llm": (
        "model.llama_model",
        "its projection has learnt that LLM's embeddings, which mean nothing to another",
    ),
    "vision": ("model.vision_model", "its projection has learnt what that vision tower says"),
    "bridge": ("model.bridge", "its projection has learnt what comes through that bridge"),
    "projector": ("model.projector", "the layers are others"),
}


def identity(path: Path) -> dict[str, str]:
    """Return {"name", "fingerprint"} of a weight file."""
    return {"name": path.name, "fingerprint": fingerprint(path)}


def check_composition(saved: Any, path: Path, where: str, own: dict[str, str]) -> None:
    """Raise CheckpointError if a checkpoint names a composition (LLM, tower, bridge, projector) other than `own`.

    `saved` is the content of its file, `own` a model's `composition()`. A part that it does not name is not compared.
    """
    theirs = mapping(saved_identity(saved).get("composition"))
    for part, ours in own.items():
        found = theirs.get(part, ours)
        if found != ours:
            key, reason = _PARTS[part]
            raise CheckpointError(
                f"{where}: '{path}' was trained with {key} {found}, this model has {ours}: {reason}. Set {key} as it "
                f"was trained, or train anew without {where}"
            )


def check_identity(saved: Any, path: Path, where: str, own: dict) -> None:
    """Raise CheckpointError as `check_composition`, warn as `compare_identity`; `own` is a model's `identity()`."""
    check_composition(saved, path, where, mapping(own.get("composition")))
    compare_identity(saved, path, where, own)


def saved_identity(saved: Any) -> dict:
    """Return the identity in a checkpoint's content `saved`, {} if it has none."""
    return mapping(mapping(mapping(saved).get("progress")).get("identity"))


def compare_identity(saved: Any, path: Path, where: str, own: dict) -> None:
    """Warn if a checkpoint names frozen weights other than those of `own`, a model's `identity()`.

    `saved` is the content of its file. A checkpoint of another program names none.
    """
    for kind, key, theirs, ours in identity_pairs(saved_identity(saved), own):
        if not ours:
            continue
        if mapping(theirs).get("fingerprint", ours["fingerprint"]) != ours["fingerprint"]:
            logging.warning(
                "%s: '%s' was trained with another %s (%s) than %s (%s); what it says may be worse, or nonsense",
                *(where, path, kind, as_text(theirs), f"model.{key}", as_text(ours)),
            )


def identity_pairs(theirs: dict, own: dict) -> list[tuple[str, str, Any, Any]]:
    """Return [(kind, key of the section `model`, identity in `theirs`, identity in `own`)] of all frozen weights."""
    pairs = [("LLM", "llama_model", theirs.get("llm"), own.get("llm"))]
    vision = mapping(theirs.get("vision"))
    for key, ours in mapping(own.get("vision")).items():
        pairs.append((f"{key} file", key, vision.get(key), ours))
    return pairs


def as_text(identity: dict) -> str:
    """Return an identity as text for messages."""
    return ", ".join(f"{name} {value}" for name, value in identity.items())


def mapping(value: Any) -> dict:
    """Return `value` if it is a dict, else {}: a checkpoint may hold anything."""
    return value if isinstance(value, dict) else {}


def trained_text(saved: Any) -> tuple[str, str] | None:
    """Return the (prompt_template, end_sym) that a checkpoint was trained with; None if it does not name them."""
    # the identity in our checkpoints, or the configuration, which the trainer of 2023 saved too
    for found in (saved_identity(saved), mapping(mapping(saved).get("config")).get("model")):
        if "{}" in str(mapping(found).get("prompt_template")):
            return str(found["prompt_template"]), str(found.get("end_sym", "\n"))
    return None
