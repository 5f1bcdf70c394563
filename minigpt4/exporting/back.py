"""The reverse of an export to transformers: recover the checkpoint, bit for bit."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file, save_file

from minigpt4.common.checkpoint import CheckpointError
from minigpt4.common.checkpoint_folder import CONFIG
from minigpt4.common.utils import FOLDER_MANIFEST, FOLDER_WEIGHTS, file_sha256, read_json
from minigpt4.exporting import names
from minigpt4.exporting.forms import BY_CLASS
from minigpt4.exporting.hf import OWN
from minigpt4.models.checkpoint_folder import RUN_CARDS, written_whole
from minigpt4.models.vision.qformer import to_release_name


def is_export(path: str | Path) -> bool:
    """Return whether `path` is a folder that `export_hf` wrote."""
    return all(
        (Path(path) / name).is_file() for name in ("config.json", f"{OWN}/{FOLDER_MANIFEST}")
    )


def exported_tensors(folder: Path, wanted: Iterable[str] = ()) -> names.Tensors:
    """Return the tensors of an export under the names of a checkpoint.

    A class may have several tables of names: the first that gives all of `wanted` is used, else the last. Raises
    CheckpointError if the folder is of another class.
    """
    class_name = read_json(folder / "config.json")["architectures"][0]
    if class_name not in BY_CLASS:
        raise CheckpointError(
            f"CHECKPOINT: '{folder}' is a {class_name}; expected one of {', '.join(BY_CLASS)}"
        )
    found, ours = {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        # Some exports have the prefix "model.", others do not.
        for name, tensor in load_file(file).items():
            found[name.removeprefix("model.")] = tensor
    for table in BY_CLASS[class_name].tables:
        ours = {
            to_release_name(name): tensor
            for name, tensor in names.from_transformers(found, table).items()
        }
        if all(name in ours for name in wanted):
            break
    return ours


def import_hf(source: Path, folder: Path) -> None:
    """Write the checkpoint folder that an export was made from; its weights have the hash of the original.

    Raises CheckpointError if they have not, because the export was trained or changed since.
    """
    expected = read_json(source / OWN / FOLDER_MANIFEST)["weights"]
    found = exported_tensors(source, expected["tensors"])
    if missing := [name for name in expected["tensors"] if name not in found]:
        raise CheckpointError(
            f"CHECKPOINT: '{source}' does not hold {len(missing)} tensors of its checkpoint ({', '.join(missing[:3])}, "
            "..): LoRA was merged into the LLM, for good. Keep the checkpoint itself"
        )
    with written_whole(folder) as scratch:
        tensors = {name: found[name].contiguous() for name in expected["tensors"]}
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
