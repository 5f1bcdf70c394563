"""The key `imports` of a configuration: the user's own modules, whose classes register themselves."""

import importlib
import logging
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minigpt4.common.config_report import Report

# beginnings of the file names of traceback frames that are not the user's code
_NOT_OWN = ("<frozen", str(Path(importlib.__file__).parent), str(Path(__file__).parent))


def import_modules(names: Any, folders: Iterable[Path], report: Report) -> list[str]:
    """Import the modules `names` (a list, one name, or None) and return them as a list; report what fails.

    `folders` are appended to sys.path, in their order, so that no file in them hides an installed
    package. They stay there, for later imports of the modules.
    """
    names = _listed(names)
    places = [str(folder) for folder in folders]
    if names:
        sys.path += [place for place in places if place not in sys.path]
    for number, name in enumerate(names):
        if name in names[:number]:  # listed twice
            continue
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            example = "imports: [my_package.my_module]"
            report.add(
                "imports", f"{name!r} is no module's name; write {example}, without / and .py"
            )
            continue
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # of any kind: the user's code may raise anything
            report.add("imports", _reason(name, error, places))
    return names


def shipped_imports(names: Any, path: str | Path) -> list[str]:
    """Return this project's modules among the `names` that a checkpoint at `path` wants to be imported.

    The others are left out, with a warning: a checkpoint may come from an untrusted source.
    """
    names = _listed(names)
    shipped = [name for name in names if str(name).startswith("minigpt4.")]
    if others := [name for name in names if name not in shipped]:
        logging.warning(
            f"'{path}' names code of its own, {others}, which is not imported; if you trust it: --options "
            f"imports=[{','.join(map(str, names))}]"
        )
    return shipped


def _listed(names: Any) -> list[Any]:
    """Return the value of the key `imports`, which may be a list, one name or nothing, as a list."""
    if isinstance(names, Sequence) and not isinstance(names, str):
        return list(names)
    return [] if names is None else [names]


def _reason(name: str, error: BaseException, places: Sequence[str]) -> str:
    """Return why a module could not be imported, and what to do."""
    what = f"'{name}' cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    # where the user's code failed; a module that does not exist has no frames of its own
    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if not frame.filename.startswith(_NOT_OWN)]
    if isinstance(error, ModuleNotFoundError) and not frames:
        searched = " and ".join(f"'{place}'" for place in places)
        return f"{what}; install it, or put it into the folder of the YAML file or the current one ({searched})"
    at = f", at {frames[-1].filename} line {frames[-1].lineno}" if frames else ""
    return f"{what}{at}; correct it, or take it out of the list"
