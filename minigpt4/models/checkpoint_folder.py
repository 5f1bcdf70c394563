"""Checkpoint folders (see common/checkpoint_folder.py): writing one, and comparing one with the model that loads it."""

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
TEXT = ("prompt_template", "end_sym", "prompts")  # the text settings in an identity
_PATHS = ("vision_model", "vit_ckpt", "q_former_model", "llama_model")
_OF_TRAINING = {"ckpt": "", "prompt_path": ""}  # keys of the run, which are emptied


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yield a new folder to write into, which becomes `folder` if the block succeeds. Raises FileExistsError."""
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
    """Write a checkpoint folder, completely or not at all.

    `config`: the unresolved configuration of the run. `identity`: the model's `identity()`, whose files are at `paths`,
    {key of the section `model`: path}. `source`: the checkpoint that the weights come from; the run cards next to it
    are copied. Raises FileExistsError if `folder` exists.
    """
    with written_whole(folder) as scratch:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, scratch / FOLDER_WEIGHTS)
        (scratch / CONFIG).write_text(config_text(config), encoding="utf-8")
        cards = [source.with_name(name) for name in RUN_CARDS] if source else []
        for card in cards:
            if card.is_file():
                shutil.copyfile(card, scratch / card.name)
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
    """Return the part of a run's configuration that a chat needs, as YAML: own code, environment and model."""
    sections = {}
    if config.get("imports"):
        sections["imports"] = config["imports"]
    env = dict(config.get("env") or {})
    if env != dict(load_environment()):
        sections["env"] = env
    model = {**config["model"], **_OF_TRAINING}
    for key in _PATHS:
        model[key] = _portable_path(model.get(key))
    sections["model"] = model
    text = yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, width=120)
    return f"# The model of this checkpoint; model.ckpt is the folder itself.\n{text}"


def _portable_path(path: Any) -> Any:
    """Return a path that names the same file from any working directory, and for shipped files on any machine."""
    if not isinstance(path, str) or not path:
        return path
    if is_url(path) or "${" in path or path.startswith(("~", "$")):
        return path
    absolute = Path(os.path.abspath(path))
    if not absolute.exists():  # the name of a model, or a file that no longer exists
        return path
    if absolute.is_relative_to(PACKAGE_DIR):
        return str(PACKAGE_DIR.name / absolute.relative_to(PACKAGE_DIR))
    return str(absolute)


def _listing(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return {name: type and shape} of tensors."""
    return {
        name: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        for name, tensor in tensors.items()
    }


def _parts(identity: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    vision = {key: with_content(part, paths[key]) for key, part in identity["vision"].items()}
    return {"llm": with_content(identity["llm"], paths["llama_model"]), "vision": vision}


def read_manifest(folder: Path, where: str) -> dict[str, Any]:
    """Return a folder's manifest, after checking its format and the hash of the weights. Raises CheckpointError."""
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
    sha256 = file_sha256(folder / FOLDER_WEIGHTS)
    if sha256 != expected:
        raise CheckpointError(
            f"{where}: '{folder / FOLDER_WEIGHTS}' has sha256 {sha256}, the manifest beside it says {expected}: one of "
            "the two was changed or damaged. Copy the folder again"
        )
    return manifest


def compared(saved: Any, path: Path, section: Mapping[str, Any], own: Mapping[str, Any]) -> Any:
    """Compare a checkpoint with a model of the identity `own`; return its content, in the form of a .pth file.

    `saved` is the content of the file at `path`, `section` the model's configuration. If frozen weights differ, a
    checkpoint folder is refused with CheckpointError, which names both sides; for a file there is only a warning.
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
    content = {"progress": {"identity": identity}}
    trained_with.check_composition(content, path.parent, "model.ckpt", own["composition"])
    for kind, key, theirs, ours in trained_with.identity_pairs(parts, own):
        if theirs and ours and not is_same(theirs, ours, section[key]):
            raise CheckpointError(
                f"model.ckpt: '{path.parent}' was trained with another {kind} ({trained_with.as_text(theirs)}) than "
                f"model.{key} '{section[key]}' ({trained_with.as_text(ours)}). Set model.{key} to what it was trained "
                f"with; to use the weights knowingly with this one, set model.ckpt to '{path}'"
            )
    return content
