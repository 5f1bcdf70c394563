"""evaluate.py: what it writes, what it resumes from, and what it says about a wrong command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt4.evaluate import evaluate, parse_args
from minigpt4.evaluation.answering import answered
from tests.small_release import picture

ROOT = Path(__file__).resolve().parents[2]


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


def test_each_image_gets_a_line_once_and_an_error_is_a_line(release, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(release.root / "torch"))
    folder, output = tmp_path / "images", tmp_path / "new_folder" / "answers.jsonl"
    folder.mkdir()
    for seed in range(3):
        picture(seed).save(folder / f"{seed}.png")
    (folder / "bad.png").write_text("no image")
    settings = {"model.ckpt": release.checkpoint, "model.low_resource": False, "model.llm_precision": "fp32"}
    config = ["--cfg-path", str(ROOT / "eval_configs/minigpt4_eval.yaml"), *release.options(**settings)]
    shared = ["--device", "cpu", "--max-new-tokens", "6", "--output", str(output)]

    def run(*arguments):
        evaluate(parse_args([*config, *shared, *arguments]))
        return output.read_text().splitlines(), capsys.readouterr().out

    first, said = run("--images", str(folder / "1.png"))
    assert said.endswith(f"1 answers added to {output}, 0 were there\n")
    lines, said = run("--images", str(folder), "--batch-size", "2")
    assert said.endswith(f"3 answers added to {output}, 1 were there\n")
    assert lines[:1] == first and run("--images", str(folder))[0] == lines
    records = [json.loads(line) for line in lines]
    assert [record["image"] for record in records] == [str(folder / f"{name}.png") for name in (1, 0, 2, "bad")]
    assert [list(record) for record in records] == [["image", "answer"]] * 3 + [["image", "error"]]
    assert f"image '{folder / 'bad.png'}'" in records[3]["error"]
