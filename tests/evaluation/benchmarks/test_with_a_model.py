"""A benchmark from the configuration to results, with a real, small model."""

import json
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

import minigpt4
from minigpt4.common.config import Config
from minigpt4.common.utils import file_sha256
from minigpt4.evaluate import main, parse_args
from minigpt4.evaluation.run import evaluate_benchmarks, open_benchmarks, run_benchmarks
from tests.evaluation.benchmarks import official
from tests.small_release import picture

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def options(release, tmp_path, monkeypatch):
    """Return a function: the command line's options for six questions about two images."""
    monkeypatch.setenv("TORCH_HOME", str(release.root / "torch"))
    for seed in range(2):
        picture(seed).save(tmp_path / f"{seed}.png")
    words = ["what is it?", "which is the old wall", "who watched?"]
    rows = [
        {"image": f"{n % 2}.png", "question": words[n // 2], "answer": "water"} for n in range(6)
    ]
    official.write_lines(tmp_path / "questions.jsonl", rows)

    def options(**more):
        section = {
            "eval_file_path": tmp_path / "questions.jsonl",
            "img_path": tmp_path,
            "max_new_tokens": 6,
            **more,
        }
        settings = {f"evaluation_datasets.own_jsonl.{key}": value for key, value in section.items()}
        settings |= {
            "model.ckpt": release.checkpoint,
            "model.low_resource": False,
            "model.llm_precision": "fp32",
        }
        return release.options(**settings)

    return options


@pytest.fixture
def config(options):
    """Return a function: the Config of `options`."""
    path = str(ROOT / "eval_configs/minigpt4_eval.yaml")
    return lambda **more: Config(Namespace(cfg_path=path, options=options(**more)[1:]))


def test_a_models_answers_are_scored_and_scored_again_without_the_model(
    config, release, tmp_path, monkeypatch
):
    one = evaluate_benchmarks(config(batch_size=1), ["own_jsonl"], tmp_path / "one", "cpu")[
        "own_jsonl"
    ]
    batch = evaluate_benchmarks(config(batch_size=4), ["own_jsonl"], tmp_path / "batch", "cpu")[
        "own_jsonl"
    ]
    assert (
        one.with_name("answers.jsonl").read_text() == batch.with_name("answers.jsonl").read_text()
    )
    content = json.loads(batch.read_text())
    assert content["weights"] == {release.checkpoint.name: file_sha256(release.checkpoint)}
    assert content["config"]["model"]["arch"] == "mini_gpt4"
    assert content["settings"]["temperature"] == 0
    assert content["counts"]["answered"] == 6 and content["settings"]["batch_size"] == 4

    blank = evaluate_benchmarks(config(), ["own_jsonl"], tmp_path / "batch", "cpu", "blank")[
        "own_jsonl"
    ]
    said = [record["answer"] for record in json.loads(blank.read_text())["items"]]
    assert said[::2] == said[1::2] and said != [record["answer"] for record in content["items"]]

    # The model is not loaded if nothing is left to answer or nothing can be answered.
    monkeypatch.setattr(minigpt4, "load_config", None)
    again = evaluate_benchmarks(config(batch_size=4), ["own_jsonl"], tmp_path / "batch", "cpu")[
        "own_jsonl"
    ]
    assert json.loads(again.read_text())["metrics"] == content["metrics"]
    with pytest.raises(
        ValueError, match=r"evaluation_datasets\.own_jsonl: item '1': the message is empty"
    ):
        official.write_lines(
            tmp_path / "questions.jsonl", [{"image": "0.png", "question": " ", "answer": "x"}]
        )
        evaluate_benchmarks(config(), ["own_jsonl"], tmp_path / "empty", "cpu")


KILLED = """
import os, signal, sys
from minigpt4.evaluate import main
from minigpt4.evaluation.answer_file import AnswerFile

add, lines = AnswerFile.add, []

def add_and_die(self, line):
    add(self, line)
    lines.append(line)
    if len(lines) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

AnswerFile.add = add_and_die
main(sys.argv[2:])
"""


def test_a_killed_evaluation_resumes_and_writes_the_same(config, options, release, tmp_path):
    whole = evaluate_benchmarks(config(batch_size=1), ["own_jsonl"], tmp_path / "whole", "cpu")[
        "own_jsonl"
    ]
    command = [
        "--cfg-path",
        "eval_configs/minigpt4_eval.yaml",
        "--tasks",
        "own_jsonl",
        "--device",
        "cpu",
    ]
    command += ["--output", str(tmp_path / "killed"), *options(batch_size=1)]
    program = [sys.executable, "-c", KILLED, "4", *command]
    result = subprocess.run(program, cwd=ROOT, env=release.env, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stdout + result.stderr
    folder = tmp_path / "killed/own_jsonl"
    before = (folder / "answers.part0.jsonl").read_text()
    assert before.count("\n") == 4 and not (folder / "results.json").exists()
    again = evaluate_benchmarks(config(batch_size=1), ["own_jsonl"], tmp_path / "killed", "cpu")[
        "own_jsonl"
    ]
    assert (folder / "answers.jsonl").read_text() == whole.with_name("answers.jsonl").read_text()
    assert (folder / "answers.jsonl").read_text().startswith(before)
    content, expected = (json.loads(path.read_text()) for path in (again, whole))
    assert content["asked_in_this_call"] == 2
    assert content["metrics"] == expected["metrics"] and content["items"] == expected["items"]


CFG = ["--cfg-path", "eval_configs/embedded_eval.yaml"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([*CFG], "give one of --images, --tasks and --compare"),
        ([*CFG, "--images", "a", "--tasks", "pope"], "give one of --images, --tasks and --compare"),
        (["--tasks", "pope"], "the following arguments are required: --cfg-path"),
        ([*CFG, "--tasks", "pope", "--batch-size", "2"], "--batch-size is for --images"),
        ([*CFG, "--images", "a", "--control", "blank"], "--control is for --tasks"),
        ([*CFG, "--tasks", "pope", "--control", "blnk"], "invalid choice: 'blnk'"),
    ],
)
def test_a_command_line_that_asks_for_two_things(command, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse_args(command)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_a_task_with_a_typo_ends_the_program_with_a_hint(release, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(release.root / "torch"))
    options = release.options(**{"model.ckpt": release.checkpoint})
    assert main(["--cfg-path", "eval_configs/minigpt4_eval.yaml", "--tasks", "popp", *options]) == 2
    assert "Did you mean 'pope'?" in capsys.readouterr().err


def test_two_results_are_compared_without_a_configuration(config, tmp_path, capsys):
    for name, answers in (("a", ["water", "x", "x", "x", "x", "x"]), ("b", ["water"] * 6)):
        benchmarks = open_benchmarks(config(), ["own_jsonl"])
        said = dict(zip((item.id for item in benchmarks["own_jsonl"].items), answers, strict=True))
        run_benchmarks(benchmarks, tmp_path / name, lambda items, _, said=said: _lines(items, said))
    paths = [str(tmp_path / name / "own_jsonl/results.json") for name in "ab"]
    assert main(["--compare", *paths, "--output", str(tmp_path / "c")]) == 0
    assert (
        "5 items changed" in capsys.readouterr().out and (tmp_path / "c/comparison.html").is_file()
    )


def _lines(items, said):
    return ({"id": item.id, "answer": said[item.id]} for item in items)
