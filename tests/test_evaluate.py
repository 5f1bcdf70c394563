"""evaluate.py: what it goes on from, and what it says about a wrong command line."""

import subprocess
import sys
from pathlib import Path

import pytest

from minigpt4.evaluation.answering import answered

ROOT = Path(__file__).resolve().parents[1]


def test_evaluate_takes_a_cut_line_away_and_refuses_other_files(tmp_path):
    output = tmp_path / "answers.jsonl"
    output.write_text('{"image": "a.jpg", "answer": "one"}\n{"image": "b.jpg", "ans')
    assert answered(output, "image") == {"a.jpg"}
    assert output.read_text() == '{"image": "a.jpg", "answer": "one"}\n'
    for other in ("notes", "notes\n", '{"caption": "x"}\n'):
        output.write_text(other)
        with pytest.raises(ValueError, match="is no answer file"):
            answered(output, "image")
        assert output.read_text() == other


def test_a_mistake_on_evaluates_command_line_is_one_line(tmp_path):
    command = [
        sys.executable,
        "evaluate.py",
        "--cfg-path",
        "eval_configs/embedded_eval.yaml",
        "--images",
        str(tmp_path),
    ]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: --images: no image at '{tmp_path}'") and "Traceback" not in result.stderr
