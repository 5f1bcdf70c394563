"""A checkpoint folder: trained weights and the description of their model, opened by one path.

    model.safetensors    the trained tensors, named as in a run's checkpoints
    manifest.json        the LLM and the vision files it was trained with, template, licence, hash of the weights
    config.yaml          the section `model` of the run, so that the folder can be used as --cfg-path
    run_card.json, ..    the run card of the run that made it, if there was one

`models/checkpoint_folder.py` writes it and compares it with a model.
"""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from minigpt4.common.config_paths import find_path
from minigpt4.common.utils import FOLDER_MANIFEST, FOLDER_WEIGHTS, expand_path

CONFIG = "config.yaml"
CHECKPOINT_HELP = "short for --options model.ckpt=PATH; of a checkpoint folder it is also the --cfg-path, without one"


def is_checkpoint_folder(path: str | Path) -> bool:
    """Return whether a path is a folder with trained weights and their manifest."""
    folder = expand_path(path)
    return all((folder / name).is_file() for name in (FOLDER_MANIFEST, FOLDER_WEIGHTS))


def opened(args: Namespace) -> tuple[Path, Sequence[str]]:
    """Return (YAML file, --options) of a command line; a checkpoint folder given as --cfg-path also sets model.ckpt."""
    path, options = Path(find_path(str(args.cfg_path))), getattr(args, "options", None) or ()
    if not is_checkpoint_folder(path):
        return path, options
    return path / CONFIG, with_option(options, "model.ckpt", str(path.resolve()), first=True)


def with_option(
    options: Sequence[str] | None, key: str, value: str, first: bool = False
) -> list[str]:
    """Return --options with one more, in their spelling (items KEY=VALUE, or pairs); with `first` the others override it.

    Its value is quoted: as YAML, 2026_11 would be a number.
    """
    options, value = list(options or ()), json.dumps(value, ensure_ascii=False)
    added = [key, value] if options and "=" not in options[0] else [f"{key}={value}"]
    return [*added, *options] if first else [*options, *added]


def with_checkpoint(args: Namespace, parser: ArgumentParser) -> Namespace:
    """Turn --checkpoint of parsed arguments into one of the --options, and a folder also into a missing --cfg-path."""
    if args.checkpoint == "":
        parser.error("--checkpoint: empty; give the path of a checkpoint, or leave it out")
    if args.checkpoint:
        args.checkpoint = find_path(args.checkpoint)
        args.options = with_option(args.options, "model.ckpt", args.checkpoint)
        if not args.cfg_path and is_checkpoint_folder(args.checkpoint):
            args.cfg_path = args.checkpoint
    if not args.cfg_path:
        parser.error(
            "the following arguments are required: --cfg-path, or --checkpoint with a checkpoint folder"
        )
    return args
