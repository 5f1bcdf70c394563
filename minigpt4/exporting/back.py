"""The reverse of an export to transformers: recover the checkpoint, bit for bit."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from minigpt4.common.checkpoint import CheckpointError
from minigpt4.common.checkpoint_folder import CONFIG
from minigpt4.common.utils import FOLDER_MANIFEST, FOLDER_WEIGHTS, file_sha256, read_json
from minigpt4.exporting import names
from minigpt4.exporting.forms import BY_CLASS
from minigpt4.exporting.hf import OWN
from minigpt4.models.base_model import DTYPES
from minigpt4.models.checkpoint_folder import RUN_CARDS, written_whole
from minigpt4.models.vision.qformer import to_release_name

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


def is_export(path: str | Path) -> bool:
    """Return whether `path` is a folder that `export_hf` wrote."""
    return all(
        (Path(path) / name).is_file() for name in ("config.json", f"{OWN}/{FOLDER_MANIFEST}")
    )


def exported_tensors(folder: Path, wanted: Iterable[str] = ()) -> names.Tensors:
    """Return the tensors of an export under the names of a checkpoint.

    A class may have several tables of names: the one that gives most of `wanted` is used. Raises CheckpointError if the
    folder is of another class.
    """
    class_name = read_json(folder / "config.json")["architectures"][0]
    if class_name not in BY_CLASS:
        raise CheckpointError(
            f"CHECKPOINT: '{folder}' is a {class_name}; expected one of {', '.join(BY_CLASS)}"
        )
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        # Some exports have the prefix "model.", others do not.
        for name, tensor in load_file(file).items():
            found[name.removeprefix("model.")] = tensor
    candidates = []
    for table in BY_CLASS[class_name].tables:
        renamed = names.from_transformers(found, table)
        candidates.append({to_release_name(name): tensor for name, tensor in renamed.items()})
    return max(candidates, key=lambda tensors: sum(name in tensors for name in wanted))


def _as_listed(tensor: torch.Tensor, name: str, entry: str) -> torch.Tensor:
    """Return a tensor as the manifest lists it, such as "float32 [32, 16]": in its dtype, without rows of `make_room`."""
    dtype, shape = entry.split(" ", 1)
    if name.startswith("llama_model.") and tensor.ndim == 2:
        tensor = tensor[: json.loads(shape)[0]]
    return tensor.to(_DTYPES.get(dtype, tensor.dtype)).contiguous()


def _is_lost(tensor: torch.Tensor | None, name: str, entry: str) -> bool:
    """Return whether an export does not hold a tensor, or holds position embeddings of another number."""
    is_positions = names.POSITIONS in name
    return tensor is None or (is_positions and str(list(tensor.shape)) != entry.partition(" ")[2])


def import_hf(source: Path, folder: Path) -> None:
    """Write the checkpoint folder that an export was made from; its weights have the hash of the original.

    Raises CheckpointError if they have not, because the export was trained or changed since.
    """
    expected = read_json(source / OWN / FOLDER_MANIFEST)["weights"]
    listed = expected["tensors"]
    found = exported_tensors(source, listed)
    if lost := [name for name in listed if _is_lost(found.get(name), name, listed[name])]:
        reason = names.why_lost(lost) or "it was changed since, or files are missing"
        raise CheckpointError(
            f"CHECKPOINT: '{source}' does not hold {len(lost)} tensors of its checkpoint ({', '.join(lost[:3])}, ..): "
            f"{reason}. Keep the checkpoint itself"
        )
    with written_whole(folder) as scratch:
        tensors = {name: _as_listed(found[name], name, listed[name]) for name in listed}
        save_file(tensors, scratch / FOLDER_WEIGHTS)
        if file_sha256(scratch / FOLDER_WEIGHTS) != expected["sha256"]:
            raise CheckpointError(
                f"CHECKPOINT: the trained weights in '{source}' are not those that were exported: they were trained or "
                "converted since. Open it with transformers, or export the checkpoint again"
            )
        for name in (FOLDER_MANIFEST, CONFIG, *RUN_CARDS):
            file = source / OWN / name
            # An export may come from an untrusted source: follow no links.
            if file.is_file() and not file.is_symlink():
                shutil.copyfile(file, scratch / name)
