"""docs/evaluation.md: its sections open small files of the official formats, its commands are taken, its code works."""

import argparse
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from minigpt4.common.config import Config
from minigpt4.common.registry import registry
from minigpt4.evaluate import parse_args
from minigpt4.evaluation.prompts import shipped_prompts
from minigpt4.evaluation.run import open_benchmarks, run_benchmarks
from tests.evaluation.benchmarks import official

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, flags=re.S)


@pytest.fixture
def configuration(tmp_path, monkeypatch):
    """The YAML of the documentation beside the model's, and the files that it names, in an empty working folder."""
    (block,) = blocks("yaml")
    sections = yaml.safe_load(block)["evaluation_datasets"]
    for name, section in sections.items():
        source = tmp_path / "official" / name
        writer = official.karpathy if name == "coco_caption" else getattr(official, name)
        written, target = writer(source)["eval_file_path"], tmp_path / section["eval_file_path"]
        if name == "vizwiz":
            written = written / "val.json"
        if name == "gqa":
            written = written / "testdev_balanced_questions.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        if written.is_file():
            shutil.copy(written, target)
        else:
            shutil.copytree(written, target, dirs_exist_ok=True)
        if (source / "images").is_dir():
            shutil.copytree(source / "images", tmp_path / section["img_path"], dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "official")
    (tmp_path / "eval_configs").mkdir()
    weights = "minigpt4/quickstart/weights"
    model = (ROOT / "eval_configs/embedded_eval.yaml").read_text().replace(weights, f"{ROOT}/{weights}")
    (tmp_path / "eval_configs/my_eval.yaml").write_text(f"{model}\n{block}")
    monkeypatch.chdir(tmp_path)
    return sections


def arguments(command):
    """Return what evaluate.py takes of a command of the documentation."""
    words = shlex.split(command)
    return parse_args(words[words.index("evaluate.py") + 1 :])


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_finds_its_benchmarks(command, configuration):
    args = arguments(command)
    if args.compare:
        assert all(path.endswith("results.json") for path in args.compare)
        return
    benchmarks = open_benchmarks(Config(args, unopened=["model.*"]), args.tasks)
    assert list(benchmarks) == args.tasks and all(items for _, items in benchmarks.values())


def test_each_section_opens(configuration):
    args = argparse.Namespace(cfg_path="eval_configs/my_eval.yaml", options=[])
    assert len(open_benchmarks(Config(args, unopened=["model.*"]), configuration)) == len(configuration) >= 10


def test_the_table_names_every_benchmark_and_its_prompt():
    rows = [line.split("|")[1:-1] for line in DOCUMENT.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row[0])}
    import minigpt4.quickstart.drawn_world  # noqa: F401

    assert named == set(registry.list_benchmarks())
    for row in rows:
        names, prompts = (re.findall(r"`([^`]+)`", cell) for cell in (row[0], row[-1]))
        for number, name in enumerate(names):
            default = registry.get_benchmark_class(name).Config.prompt
            assert default == prompts[min(number, len(prompts) - 1)] and default in shipped_prompts()


def test_the_lines_of_your_own_are_read(configuration, tmp_path):
    (block,) = blocks("json")
    Path("my_questions.jsonl").write_text(block)
    for row in map(json.loads, block.splitlines()):
        for image in row.get("images", [row.get("image")]):
            official.draw(tmp_path / "my_images" / image)
    args = argparse.Namespace(cfg_path="eval_configs/my_eval.yaml", options=[])
    _, items = open_benchmarks(Config(args, unopened=["model.*"]), ["own_jsonl"])["own_jsonl"]
    assert [(item.id, len(item.images), item.group) for item in items] == [("1", 1, "colours"), ("door", 2, "")]


def always_red(items, cfg):
    return ({"id": item.id, "answer": "red"} for item in items)


def test_the_example_of_a_benchmark_of_your_own_works(configuration, own_code, tmp_path):
    (block,) = blocks("python")
    (tmp_path / "my_colours.py").write_text(block)
    (tmp_path / "colours.txt").write_text("a.png red\nb.png green\n")
    for number, name in enumerate(["a.png", "b.png"]):
        official.draw(tmp_path / name, number)
    config = Path("eval_configs/my_eval.yaml")
    config.write_text(re.sub("^imports: .*$", "imports: [my_colours]", config.read_text(), flags=re.M))
    section = [f"evaluation_datasets.colours.{key}={tmp_path}" for key in ("eval_file_path", "img_path")]
    cfg = Config(argparse.Namespace(cfg_path=str(config), options=section), unopened=["model.*"])
    benchmarks = open_benchmarks(cfg, ["colours"])
    paths = run_benchmarks(benchmarks, tmp_path / "out", always_red)
    assert json.loads(paths["colours"].read_text())["metrics"]["accuracy"]["value"] == 0.5
