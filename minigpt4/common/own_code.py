"""The key `imports` of a configuration: modules of the user's own, whose classes register themselves by name."""

import importlib
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from minigpt4.common.config_report import Report, is_in

_NOT_OWN = (
    "<frozen",
    str(Path(importlib.__file__).parent),
    str(Path(__file__).parent),
)  # files that are not the user's


def import_modules(names: Any, folders: Iterable[Path], report: Report) -> list[str]:
    """Import the modules of the list `names` (or of one name) and return it; what cannot be imported is reported.

    `folders` are searched, in their order, after all that Python finds anyway, so that a file in one of them never
    takes the place of an installed package. They stay on sys.path for what the modules import later.
    """
    names = names if isinstance(names, list) else [names]
    places = [str(folder) for folder in folders]
    sys.path += [place for place in places if names and place not in sys.path]
    for name in names:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            example = "imports: [my_package.my_module]"
            report.add("imports", f"{name!r} is no module's name; write {example}, without / and .py")
            continue
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # whatever the user's code does when it is imported
            report.add("imports", _reason(name, error, places))
    return names


def _reason(name: str, error: BaseException, places: Sequence[str]) -> str:
    """Return why a module could not be imported, and what to do."""
    if isinstance(error, ModuleNotFoundError) and error.name and is_in(name, error.name):
        looked = " and ".join(f"'{place}'" for place in places)
        return (
            f"no module '{error.name}' among what is installed or in {looked}; install it, or put it beside the YAML "
            "file or into the current folder"
        )
    # the innermost line of the user's code; a SyntaxError has none, but names file and line itself
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_NOT_OWN)]
    at = f", at {frames[-1].filename} line {frames[-1].lineno}" if frames else ""
    what = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"'{name}' fails when it is imported: {what}{at}; mend it, or take it out of the list"
