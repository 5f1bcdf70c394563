"""Checkpoint folders (common/checkpoint_folder.py): writing one, comparing it with the model that takes its weights."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from minigpt4.common.checkpoint import CheckpointError
from minigpt4.common.checkpoint_folder import CONFIG, is_checkpoint_folder
from minigpt4.common.config import load_environment
from minigpt4.common.config_paths import PACKAGE_DIR
from minigpt4.common.utils import FOLDER_MANIFEST, FOLDER_WEIGHTS, file_sha256, is_url, read_json
from minigpt4.common.versions import versions
from minigpt4.models import trained_with
from minigpt4.models.fingerprints import is_same, with_content

FORMAT = {"format": "minigpt4-checkpoint", "version": 1}
RUN_CARDS = ("run_card.json", "run_card.md", "loss.png")
TEXT = ("prompt_template", "end_sym", "prompts")  # of an identity
_PATHS = ("vision_model", "vit_ckpt", "q_former_model", "llama_model")
_OF_TRAINING = {"ckpt": "", "prompt_path": ""}  # keys that belong to the run, not to the model


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Give a folder to write into; it becomes `folder` if the block succeeds. Raises FileExistsError for one there."""
    if folder.exists():
        raise FileExistsError(f"'{folder}' is there already; give a new folder, or remove it")
    scratch = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    scratch.mkdir(parents=True)
    try:
        yield scratch
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_folder(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    identity: Mapping[str, Any],
    paths: Mapping[str, str],
    license: str | None = None,
    source: Path | None = None,
) -> None:
    """Write a checkpoint folder, whole or not at all.

    `config`: that of the run, unresolved. `identity`: that of the model, whose files are at `paths`, {key of the
    section `model`: path}. `source`: the checkpoint that the weights come from; run cards beside it are copied. Raises
    FileExistsError if there is something at `folder`.
    """
    with written_whole(folder) as scratch:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            scratch / FOLDER_WEIGHTS,
        )
        (scratch / CONFIG).write_text(config_text(config), encoding="utf-8")
        for card in RUN_CARDS if source else ():
            if (beside := source.with_name(card)).is_file():
                shutil.copyfile(beside, scratch / card)
        manifest = FORMAT | {
            "licence": license,
            "weights": {
                "sha256": file_sha256(scratch / FOLDER_WEIGHTS),
                "tensors": _listing(tensors),
            },
            "parts": _parts(identity, paths),
            "composition": identity["composition"],
            "template": {key: identity[key] for key in TEXT},
            "made_from": source.name if source else None,
            "made_with": versions(),
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        (scratch / FOLDER_MANIFEST).write_text(f"{text}\n", encoding="utf-8")


def config_text(config: Mapping[str, Any]) -> str:
    """Return the YAML of a run's configuration as a chat needs it: own code, environment and model."""
    model = {**config["model"], **_OF_TRAINING}
    for key in _PATHS:
        model[key] = _lasting(model.get(key))
    kept = {key: config[key] for key in ("imports",) if config.get(key)}
    if (env := dict(config.get("env") or {})) != dict(load_environment()):
        kept["env"] = env
    text = yaml.safe_dump(kept | {"model": model}, sort_keys=False, allow_unicode=True, width=120)
    return f"# The model of this checkpoint; model.ckpt is the folder itself.\n{text}"


def _lasting(path: Any) -> Any:
    """Return a path that leads to the same file from any working directory; of what is shipped, on any machine."""
    if (
        not isinstance(path, str)
        or not path
        or is_url(path)
        or "${" in path
        or path.startswith(("~", "$"))
    ):
        return path
    absolute = Path(os.path.abspath(path))
    if not absolute.exists():  # a name, or a file that is not there any more
        return path
    if absolute.is_relative_to(PACKAGE_DIR):
        return str(PACKAGE_DIR.name / absolute.relative_to(PACKAGE_DIR))
    return str(absolute)


def _listing(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        for name, tensor in tensors.items()
    }


def _parts(identity: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    vision = {key: with_content(part, paths[key]) for key, part in identity["vision"].items()}
    return {"llm": with_content(identity["llm"], paths["llama_model"]), "vision": vision}


def read_manifest(folder: Path, where: str) -> dict[str, Any]:
    """Return a folder's manifest; the weights beside it have its hash. Raises CheckpointError."""
    path = folder / FOLDER_MANIFEST
    try:
        manifest = read_json(path)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{where}: {error}; copy the folder again") from error
    found = {key: trained_with.mapping(manifest).get(key) for key in FORMAT}
    if found != FORMAT:
        raise CheckpointError(
            f"{where}: '{path}' says {found}; expected {FORMAT}. Use the folder's {FOLDER_WEIGHTS} by itself, or a "
            "newer version of this program"
        )
    expected = trained_with.mapping(manifest.get("weights")).get("sha256")
    if (sha256 := file_sha256(folder / FOLDER_WEIGHTS)) != expected:
        raise CheckpointError(
            f"{where}: '{folder / FOLDER_WEIGHTS}' has sha256 {sha256}, the manifest beside it says {expected}: one of "
            "the two was changed or damaged. Copy the folder again"
        )
    return manifest


def compared(saved: Any, path: Path, section: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    """Return what a checkpoint says of itself, compared with a model of the identity `own`.

    `saved` is what the file at `path` holds, `section` the model's. A folder of other weights is refused, with both
    sides (CheckpointError); of a file there is a warning.
    """
    if not (section["ckpt"] and is_checkpoint_folder(section["ckpt"])):
        trained_with.compare_identity(saved, path, "model.ckpt", own)
        return saved
    manifest = read_manifest(path.parent, "model.ckpt")
    parts = trained_with.mapping(manifest.get("parts"))
    identity = {
        **parts,
        **trained_with.mapping(manifest.get("template")),
        "composition": manifest.get("composition"),
    }
    trained_with.check_composition(
        {"progress": {"identity": identity}}, path.parent, "model.ckpt", own["composition"]
    )
    kinds = [("LLM", "llama_model", parts.get("llm"), own.get("llm"))]
    for key, ours in trained_with.mapping(own.get("vision")).items():
        kinds.append((f"{key} file", key, trained_with.mapping(parts.get("vision")).get(key), ours))
    for kind, key, theirs, ours in kinds:
        if theirs and ours and not is_same(theirs, ours, section[key]):
            raise CheckpointError(
                f"model.ckpt: '{path.parent}' was trained with another {kind} ({trained_with.said(theirs)}) than "
                f"model.{key} '{section[key]}' ({trained_with.said(ours)}). Set model.{key} to what it was trained with; to "
                f"use the weights knowingly with this one, set model.ckpt to '{path}'"
            )
    return {"progress": {"identity": identity}}
