"""What a checkpoint says of the model that it was trained with: its parts, their files, the text around an answer."""

import logging
from pathlib import Path
from typing import Any

from minigpt4.common.checkpoint import CheckpointError
from minigpt4.common.utils import fingerprint

# The parts of a model's composition: the key that names each, why a checkpoint does not go with another one.
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
    """Return {"name", "fingerprint"} of a file of weights."""
    return {"name": path.name, "fingerprint": fingerprint(path)}


def check_composition(saved: Any, path: Path, where: str, own: dict[str, str]) -> None:
    """Raise CheckpointError if a checkpoint says that it was trained with another LLM, tower or bridge than `own`.

    `saved` is what its file holds, `own` a model's `composition()`.
    """
    theirs = mapping(saved_identity(saved).get("composition"))
    for part, ours in own.items():
        if (found := theirs.get(part, ours)) != ours:
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
    """Return the identity that a checkpoint holds, {} if it holds none; `saved` is what its file holds."""
    return mapping(mapping(mapping(saved).get("progress")).get("identity"))


def compare_identity(saved: Any, path: Path, where: str, own: dict) -> None:
    """Warn where a checkpoint says that it was trained with other frozen weights than `own`, a model's `identity()`.

    `saved` is what its file holds. A checkpoint of another program says nothing.
    """
    theirs = saved_identity(saved)
    kinds = [("LLM", "model.llama_model", theirs.get("llm"), own.get("llm"))]
    for key, ours in mapping(own.get("vision")).items():
        kinds.append((f"{key} file", f"model.{key}", mapping(theirs.get("vision")).get(key), ours))
    for kind, key, trained_with, ours in kinds:
        if not ours:
            continue
        if mapping(trained_with).get("fingerprint", ours["fingerprint"]) != ours["fingerprint"]:
            logging.warning(
                "%s: '%s' was trained with another %s (%s) than %s (%s); what it says may be worse, or nonsense",
                *(where, path, kind, said(trained_with), key, said(ours)),
            )


def said(names: dict) -> str:
    """Return an identity as a person reads it."""
    return ", ".join(f"{name} {value}" for name, value in names.items())


def mapping(value: Any) -> dict:
    """Return `value`, or an empty dict if it is none."""
    return value if isinstance(value, dict) else {}


def trained_text(saved: Any) -> tuple[str, str] | None:
    """Return (prompt_template, end_sym) with which a checkpoint says that it was trained; None if it names none."""
    # ours, and what 2023's trainer saved, too
    for found in (saved_identity(saved), mapping(mapping(saved).get("config")).get("model")):
        if "{}" in str(mapping(found).get("prompt_template")):
            return str(found["prompt_template"]), str(found.get("end_sym", "\n"))
    return None
