"""The quickstart's former package name, minigpt4.embedded, which older docs and scripts use."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    command = [sys.executable, "-m", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("program", ["", ".quickstart", ".prepare", ".pretrain_vision"])
def test_commands_of_the_former_name_are_the_same_programs(program):
    said = run(f"minigpt4.embedded{program}", "--help")
    assert "usage:" in said and said == run(f"minigpt4.quickstart{program}", "--help")


def test_the_former_name_prepares(cache):
    said = run("minigpt4.embedded.prepare", "--cache-root", cache)
    assert said == f"the embedded default's data and language model are in {cache / 'embedded'}\n"


def test_the_former_option_of_quickstart_is_known():
    from minigpt4.quickstart.quickstart import parse_args

    assert parse_args(["--pictures", "7"]).images == parse_args(["--images", "7"]).images == 7
