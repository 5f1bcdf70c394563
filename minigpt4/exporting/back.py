"""The way back: the checkpoint of an export, bit for bit."""

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
    """Whether that is a folder that `export_hf` wrote."""
    return all(
        (Path(path) / name).is_file() for name in ("config.json", f"{OWN}/{FOLDER_MANIFEST}")
    )


def exported_tensors(folder: Path, wanted: Iterable[str] = ()) -> names.Tensors:
    """Return the tensors of an export under our names, those of a checkpoint's files.

    By the table that knows all of `wanted`, if there is one. Raises CheckpointError for no export.
    """
    class_name = read_json(folder / "config.json")["architectures"][0]
    if class_name not in BY_CLASS:
        raise CheckpointError(
            f"CHECKPOINT: '{folder}' is a {class_name}; expected one of {', '.join(BY_CLASS)}"
        )
    found, ours = {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        # it comes and goes
        found |= {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    for table in BY_CLASS[class_name].tables:
        ours = {
            to_release_name(name): tensor
            for name, tensor in names.from_transformers(found, table).items()
        }
        if all(name in ours for name in wanted):
            break
    return ours


def import_hf(source: Path, folder: Path) -> None:
    """Write the checkpoint folder that an export was made of; it has the hash of the one that was exported.

    Raises CheckpointError if it has not: the export was trained or changed since.
    """
    expected = read_json(source / OWN / FOLDER_MANIFEST)["weights"]
    found = exported_tensors(source, expected["tensors"])
    if missing := [name for name in expected["tensors"] if name not in found]:
        raise CheckpointError(
            f"CHECKPOINT: '{source}' does not hold {len(missing)} tensors of its checkpoint ({', '.join(missing[:3])}, "
            "..): LoRA was merged into the LLM, for good. Keep the checkpoint itself"
        )
    with written_whole(folder) as scratch:
        save_file(
            {name: found[name].contiguous() for name in expected["tensors"]},
            scratch / FOLDER_WEIGHTS,
        )
        if file_sha256(scratch / FOLDER_WEIGHTS) != expected["sha256"]:
            raise CheckpointError(
                f"CHECKPOINT: the trained weights in '{source}' are not those that were exported: they were trained or "
                "converted since. Open it with transformers, or export the checkpoint again"
            )
        for name in (FOLDER_MANIFEST, CONFIG, *RUN_CARDS):
            file = source / OWN / name
            if file.is_file() and not file.is_symlink():  # an export may be a stranger's
                shutil.copyfile(file, scratch / name)
