"""Numbers produced by running the newest release; `MINIGPT4_GOLDEN_V2` names another set of the same layout.

A folder or a file that a set lacks is skipped by name; one that it has beside is played.
"""

import json
import os
from pathlib import Path

import pytest

GOLDEN = Path(os.environ.get("MINIGPT4_GOLDEN_V2") or Path(__file__).parent / "data")


def read(name, default=()):
    """Return what a JSON file of the set holds; `default` where the set has none."""
    path = GOLDEN / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default


def needs(*names):
    """Return the mark of tests that cannot be without some files or folders of the set."""
    absent = [name for name in names if not (GOLDEN / name).exists()]
    return pytest.mark.skipif(
        bool(absent), reason=f"this set of fixtures has no {', '.join(absent)}"
    )
