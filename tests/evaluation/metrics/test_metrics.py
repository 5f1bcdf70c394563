"""The package as a whole."""

import json
import subprocess
import sys
from pathlib import Path

import tomllib

from minigpt4.evaluation import metrics

PACKAGE = Path(metrics.__file__).parent


def test_metrics_need_no_torch():
    probe = (
        "import sys; from minigpt4.evaluation.metrics import box_iou; print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    )
    assert result.stdout == "False\n"


def test_the_tables_are_part_of_the_installed_package():
    globs = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "minigpt4"
    ]
    tables = list(PACKAGE.glob("*.json"))
    assert len(tables) == 2 and "evaluation/metrics/*.json" in globs
    for table in tables:
        # json.loads would silently drop the first value of a duplicate key
        pairs = json.loads(table.read_text(encoding="utf-8"), object_pairs_hook=list)
        assert len(pairs) == len({pair[0] for pair in pairs})
