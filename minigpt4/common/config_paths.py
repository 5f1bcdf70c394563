"""Look-up of the paths that a configuration names.

A relative path starts from the working directory; if nothing is there, from the folder of the YAML file. Files that the
project ships are found from anywhere. The dataclass of a section says which of its keys are paths: `READ_PATHS` for
existing files and folders, `WRITTEN_PATHS` for those that a program makes.
"""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from minigpt4.common.config_report import Report
from minigpt4.common.utils import expand_path, is_url

PACKAGE_DIR = Path(__file__).resolve().parents[1]
_BRACES = r"\{[^{}]*\}"
# Folders that the project ships, beside the package in a checkout and inside it once it is installed.
_SHIPPED = ("minigpt4", "train_configs", "eval_configs", "prompts")


def find_path(path: str, folders: Sequence[Path] = ()) -> str:
    """Return `path`, below the first of `folders`, or of the project's, that has it, if the working directory lacks it.

    A pattern such as shards/{0..9}.tar is looked up as a glob, with any text in place of its braces.
    """
    is_relative = path and not path.startswith(("~", "$", "/"))
    if not is_relative or "${" in path or is_url(path) or _is_there(path):
        return path
    folders = list(folders)
    if Path(path).parts[0] in _SHIPPED:
        folders += [PACKAGE_DIR.parent, PACKAGE_DIR]
    for folder in folders:
        if _is_there(path, folder):
            return str(folder / path)
    return path


def _is_there(path: str, folder: Path = Path()) -> bool:
    if os.path.exists(folder / path):
        return True
    pattern, shorter = path, re.sub(_BRACES, "*", path)
    while shorter != pattern:  # braces may be nested
        pattern, shorter = shorter, re.sub(_BRACES, "*", shorter)
    return glob.has_magic(pattern) and any(glob.iglob(pattern, root_dir=folder))


def settle_paths(section: DictConfig, where: str, folders: Sequence[Path], report: Report) -> None:
    """Look up the paths of a typed section and its nested sections; report those that are empty or cannot be expanded."""
    plain, schema = OmegaConf.to_container(section), OmegaConf.get_type(section)
    read, written = getattr(schema, "READ_PATHS", ()), getattr(schema, "WRITTEN_PATHS", ())
    for key, value in plain.items():
        if key in (*read, *written):
            has_default = getattr(schema, key, None) not in (None, "")
            if value == "" and has_default:
                report.add(f"{where}.{key}", "empty; give a path")
            if key in read:
                section[key] = _found(value, folders)
            for path in value if isinstance(value, list) else [value]:
                _check_expansion(path, f"{where}.{key}", report)
        if isinstance(value, dict):
            settle_paths(section[key], f"{where}.{key}", folders, report)


def _found(value: Any, folders: Sequence[Path]) -> Any:
    """Return a path, or a list of paths, looked up by `find_path`."""
    if isinstance(value, list):
        return [_found(item, folders) for item in value]
    return find_path(value, folders) if isinstance(value, str) else value


def _check_expansion(path: Any, key: str, report: Report) -> None:
    """Report a `~` or a variable in a path that cannot be expanded; an interpolation `${..}` is not one."""
    try:
        if isinstance(path, str) and "${" not in path:
            expand_path(path)
    except ValueError as error:
        report.add(key, str(error))
