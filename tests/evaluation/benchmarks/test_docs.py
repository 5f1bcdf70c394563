"""docs/evaluation.md: its YAML sections open small official files, its commands are accepted, its code works."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from minigpt4.common.config import Config
from minigpt4.common.registry import registry
from minigpt4.evaluate import main, parse_args
from minigpt4.evaluation.prompts import shipped_prompts
from minigpt4.evaluation.run import open_benchmarks, run_benchmarks
from tests.evaluation.benchmarks import official

ROOT = Path(__file__).resolve().parents[3]
DOCUMENT = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, flags=re.S)


@pytest.fixture
def configuration(tmp_path, monkeypatch):
    """Write the documentation's YAML, the model's and the files that they name into an empty working folder."""
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
    model = (
        (ROOT / "eval_configs/embedded_eval.yaml").read_text().replace(weights, f"{ROOT}/{weights}")
    )
    (tmp_path / "eval_configs/my_eval.yaml").write_text(f"{model}\n{block}")
    monkeypatch.chdir(tmp_path)
    return sections


def arguments(command):
    """Return the arguments that evaluate.py parses from a command of the documentation."""
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


@pytest.fixture
def small_model(configuration, release, tmp_path, monkeypatch):
    """Give the documentation's YAML a small real model, whose checkpoint is where the commands expect it."""
    monkeypatch.setenv("TORCH_HOME", str(release.root / "torch"))
    model = yaml.safe_load((ROOT / "eval_configs/minigpt4_eval.yaml").read_text())
    model["model"] |= {
        "llama_model": str(release.llama),
        "ckpt": "output/checkpoint_3.pth",
        "low_resource": False,
    }
    model["model"] |= {"llm_precision": "fp32"}
    model["run"] = model.get("run", {}) | {"device": "cpu"}
    sections = {name: section | {"max_new_tokens": 4} for name, section in configuration.items()}
    content = yaml.safe_dump(model | {"evaluation_datasets": sections})
    (tmp_path / "eval_configs/my_eval.yaml").write_text(content)
    # two images, as the control "shuffled" needs
    (path,) = (tmp_path / "data/vqav2").rglob("*val2014_questions.json")
    questions = json.loads(path.read_text())
    questions["questions"][0]["image_id"] = 1
    path.write_text(json.dumps(questions))
    (tmp_path / "output").mkdir()
    shutil.copy(release.checkpoint, tmp_path / "output/checkpoint_3.pth")
    return release


def test_the_commands_run_one_after_another_and_write_what_is_promised(
    small_model, tmp_path, capsys
):
    programs = [shlex.split(command)[0] for command in COMMANDS]
    assert programs.count("python") >= 5 and programs.count("torchrun") == 1
    for command, program in zip(COMMANDS, programs, strict=True):
        args = arguments(command)
        if program == "python":
            assert main(shlex.split(command)[2:]) == 0, capsys.readouterr().err
        else:
            alone = {
                name: (args.output / name / "answers.jsonl").read_text() for name in args.tasks
            }
            shutil.rmtree(args.output)
            words = shlex.split(command.replace("--nproc-per-node 8", "--nproc-per-node 2"))
            words[words.index("evaluate.py")] = str(ROOT / "evaluate.py")
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            result = subprocess.run(
                [*launcher, *words[1:]], capture_output=True, text=True, env=small_model.env
            )
            assert result.returncode == 0, result.stdout + result.stderr
            for name, text in alone.items():
                assert (args.output / name / "answers.jsonl").read_text() == text
        for name in args.tasks or ():
            folder = args.output / (f"{name}-{args.control}" if args.control else name)
            counts = json.loads((folder / "results.json").read_text())["counts"]
            assert counts["answered"] == counts["items"] > 0 and (folder / "results.html").is_file()
        if args.compare:
            assert (args.output / "comparison.html").is_file()


def test_each_section_opens(configuration):
    args = argparse.Namespace(cfg_path="eval_configs/my_eval.yaml", options=[])
    assert (
        len(open_benchmarks(Config(args, unopened=["model.*"]), configuration))
        == len(configuration)
        >= 10
    )


def test_the_table_names_every_benchmark_and_its_prompt():
    rows = [line.split("|")[1:-1] for line in DOCUMENT.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row[0])}
    import minigpt4.quickstart.drawn_world  # noqa: F401

    assert named == set(registry.list_benchmarks())
    for row in rows:
        names, prompts = (re.findall(r"`([^`]+)`", cell) for cell in (row[0], row[-1]))
        for number, name in enumerate(names):
            default = registry.get_benchmark_class(name).Config.prompt
            assert (
                default == prompts[min(number, len(prompts) - 1)] and default in shipped_prompts()
            )


def test_the_examples_of_own_jsonl_lines_are_read(configuration, tmp_path):
    (block,) = blocks("json")
    Path("my_questions.jsonl").write_text(block)
    for row in map(json.loads, block.splitlines()):
        for image in row.get("images", [row.get("image")]):
            official.draw(tmp_path / "my_images" / image)
    args = argparse.Namespace(cfg_path="eval_configs/my_eval.yaml", options=[])
    _, items = open_benchmarks(Config(args, unopened=["model.*"]), ["own_jsonl"])["own_jsonl"]
    assert [(item.id, len(item.images), item.group) for item in items[:2]] == [
        ("1", 1, "colours"),
        ("door", 2, ""),
    ]
    assert (items[2].id, items[2].options, len(items)) == ("kettle", ["yes", "no"], 3)


def test_the_example_of_ranking_runs(small_model, tmp_path):
    (block,) = [block for block in blocks("python") if "candidate_losses" in block]
    official.draw(tmp_path / "kitchen.jpg")
    names = {}
    exec(block, names)
    assert len(names["losses"]) == 2 and len(set(names["losses"])) == 2


def always_red(items, cfg):
    return ({"id": item.id, "answer": "red"} for item in items)


def test_the_example_of_a_benchmark_of_your_own_works(configuration, own_code, tmp_path):
    (block,) = [block for block in blocks("python") if "register_benchmark" in block]
    (tmp_path / "my_colours.py").write_text(block)
    (tmp_path / "colours.txt").write_text("a.png red\nb.png green\n")
    for number, name in enumerate(["a.png", "b.png"]):
        official.draw(tmp_path / name, number)
    config = Path("eval_configs/my_eval.yaml")
    config.write_text(
        re.sub("^imports: .*$", "imports: [my_colours]", config.read_text(), flags=re.M)
    )
    section = [
        f"evaluation_datasets.colours.{key}={tmp_path}" for key in ("eval_file_path", "img_path")
    ]
    cfg = Config(argparse.Namespace(cfg_path=str(config), options=section), unopened=["model.*"])
    benchmarks = open_benchmarks(cfg, ["colours"])
    paths = run_benchmarks(benchmarks, tmp_path / "out", always_red)
    assert json.loads(paths["colours"].read_text())["metrics"]["accuracy"]["value"] == 0.5
