"""Where the files lie that a configuration names.

A relative path is taken from the working directory; if nothing is there, from the folder of the YAML file; and what
the project ships is found from anywhere. Dataclasses of sections say which of their keys are paths: `READ_PATHS` of
what is there before, `WRITTEN_PATHS` of what is made.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from minigpt4.common.config_report import Report
from minigpt4.common.utils import expand_path, is_url

PACKAGE_DIR = Path(__file__).resolve().parents[1]
# What the project ships, beside the package in a checkout and inside it once it is installed.
_SHIPPED = ("minigpt4", "train_configs", "eval_configs", "prompts")


def find_path(path: str, folders: Sequence[Path] = ()) -> str:
    """Return `path`; where the working directory lacks it, that below the first of `folders`, or of ours, that has it.

    Of a pattern such as shards/{0..9}.tar its fixed beginning is looked for.
    """
    fixed = re.split(r"[{*?\[]", path)[0]
    if (
        not fixed
        or fixed.startswith(("~", "$", "/"))
        or "${" in path
        or is_url(path)
        or os.path.exists(fixed)
    ):
        return path
    is_shipped = Path(fixed).parts[0] in _SHIPPED
    for folder in [*folders, *([PACKAGE_DIR.parent, PACKAGE_DIR] if is_shipped else ())]:
        if os.path.exists(folder / fixed):
            return str(folder / path)
    return path


def settle_paths(section: DictConfig, where: str, folders: Sequence[Path], report: Report) -> None:
    """Look up the paths of a typed section and of those within it; report what leads nowhere or is empty."""
    plain, schema = OmegaConf.to_container(section), OmegaConf.get_type(section)
    read, written = getattr(schema, "READ_PATHS", ()), getattr(schema, "WRITTEN_PATHS", ())
    for key, value in plain.items():
        if (
            key in (*read, *written)
            and value == ""
            and getattr(schema, key, None) not in (None, "")
        ):
            report.add(f"{where}.{key}", "empty; give a path")
        if key in read:
            section[key] = _found(value, folders)
        if key in (*read, *written):
            for path in value if isinstance(value, list) else [value]:
                _check_home(path, f"{where}.{key}", report)
        if isinstance(value, dict):
            settle_paths(section[key], f"{where}.{key}", folders, report)


def _found(value: Any, folders: Sequence[Path]) -> Any:
    if isinstance(value, list):
        return [_found(item, folders) for item in value]
    return find_path(value, folders) if isinstance(value, str) else value


def _check_home(path: Any, key: str, report: Report) -> None:
    try:
        if isinstance(path, str) and (path.startswith("~") or "$" in path):
            expand_path(path)
    except ValueError as error:
        report.add(key, str(error))
