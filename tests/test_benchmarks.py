"""The measurements run, print their table, and hold what does not depend on a clock."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_load(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "load", "--size", "vit-slice", "--rounds", "1"]
    command += ["--folder", str(tmp_path), "--json", str(tmp_path / "load.json")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads((tmp_path / "load.json").read_text())
    assert "equal tensors: yes" in result.stdout
    assert set(figures["rounds"]) == {"2023", "ours", "ours, every byte read"}
    # two blocks in float32 are 200 MiB; ours holds norms and module objects only, measured: 1.6 MiB
    assert figures["median"]["2023"]["private_mib"] > 200
    assert figures["ratio"]["ours"]["private_mib"] > 50
