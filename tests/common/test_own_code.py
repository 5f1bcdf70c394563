"""`imports:`: the user's modules, beside the YAML file, in the current folder, or installed, and training with them."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from minigpt4.common.config import Config, ConfigError, Problem
from minigpt4.common.config_report import Report
from minigpt4.common.own_code import import_modules, shipped_imports

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("own_code")


def problems_of(names, *folders):
    report = Report()
    import_modules(names, folders, report)
    assert all(problem.key == "imports" for problem in report.problems)
    return [problem.message for problem in report.problems]


@pytest.mark.parametrize("names", [5, {"a": 1}, [["x"]], "x", ["x", 5]])
def test_what_a_checkpoint_names_is_left_out_whatever_it_is(names, caplog):
    assert shipped_imports(names, "c.pth") == [] and "names code of its own" in caplog.text


def test_a_checkpoint_may_name_modules_of_this_project():
    assert shipped_imports(["minigpt4.tasks", "x"], "c.pth") == ["minigpt4.tasks"]
    assert shipped_imports(None, "c.pth") == []


def test_the_folders_are_searched_in_their_order_behind_what_is_installed(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name / "own_package").mkdir(parents=True)
        (tmp_path / name / "own_package/code.py").write_text(f"place = '{name}'")
        (tmp_path / name / "yaml.py").write_text("raise RuntimeError('not this one')")
    (tmp_path / "second/own_other.py").write_text("import yaml\nplace = 'other'")
    before = list(sys.path)
    assert problems_of([], tmp_path) == [] and sys.path == before
    folders = [tmp_path / "first", tmp_path / "second"]
    assert problems_of(["own_package.code", "own_other"], *folders) == []
    assert (
        sys.modules["own_package.code"].place == "first"
        and sys.modules["own_other"].place == "other"
    )
    assert sys.path == [*before, *map(str, folders)]
    assert problems_of("own_other", *folders) == [] and sys.path == [*before, *map(str, folders)]


BROKEN = {
    "own_raises.py": (
        "import json\njson.loads('')\n",
        "JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
        None,
    ),
    "own_raises_itself.py": ("\n\n1 / 0\n", "ZeroDivisionError: division by zero", 3),
    "own_exits.py": ("import sys\nsys.exit(3)\n", "SystemExit: 3", 2),
    "own_lacks.py": (
        "\nimport own_absent\n",
        "ModuleNotFoundError: No module named 'own_absent'",
        2,
    ),
    "own_syntax.py": ("x = (\n", "SyntaxError: '(' was never closed (own_syntax.py, line 1)", None),
    "own_double.py": (
        "from minigpt4.common.registry import registry\nfrom minigpt4.tasks import BaseTask\n"
        "@registry.register_task('image_text_pretrain')\nclass T(BaseTask):\n    pass\n",
        "RegistryError: task 'image_text_pretrain' is already registered: it is "
        "minigpt4.tasks.image_text_pretrain.ImageTextPretrainTask; give T another name",
        3,
    ),
}


@pytest.mark.parametrize("file", BROKEN)
def test_a_module_that_fails_says_why_and_where(file, tmp_path):
    text, reason, line = BROKEN[file]
    (tmp_path / file).write_text(text)
    name = file.removesuffix(".py")
    (message,) = problems_of([name], tmp_path)
    assert message.startswith(f"'{name}' cannot be imported: {reason}")
    assert message.endswith("; correct it, or take it out of the list")
    assert line is None or f", at {tmp_path / file} line {line};" in message


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            [None],
            "None is no module's name; write imports: [my_package.my_module], without / and .py",
        ),
        (
            {"a": 1},
            "{'a': 1} is no module's name; write imports: [my_package.my_module], without / and .py",
        ),
        ([3], "3 is no module's name; write imports: [my_package.my_module], without / and .py"),
        (
            ["a/own_x"],
            "'a/own_x' is no module's name; write imports: [my_package.my_module], without / and .py",
        ),
        (
            [".own_x"],
            "'.own_x' is no module's name; write imports: [my_package.my_module], without / and .py",
        ),
    ],
)
def test_what_is_no_list_of_names(names, message):
    assert problems_of(names) == [message]


def test_a_module_that_is_not_there(tmp_path):
    todo = f"install it, or put it into the folder of the YAML file or the current one ('{tmp_path}' and '/x')"
    (tmp_path / "own_here").mkdir()
    for name, missing in (("own_absent.code", "own_absent"), ("own_here.code", "own_here.code")):
        reason = f"ModuleNotFoundError: No module named '{missing}'"
        assert problems_of([name], tmp_path, Path("/x")) == [
            f"'{name}' cannot be imported: {reason}; {todo}"
        ]


def test_problems_of_imports_stand_in_the_one_report(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("imports:\n  - own_absent\nmodel: {arch: own_model}\nrun: {sede: 3}\n")
    with pytest.raises(ConfigError) as caught:
        Config(Namespace(cfg_path=path, options=["run.task=own_task"]))
    imports, arch, task, seed = caught.value.problems
    assert (imports.key, imports.place) == (
        "imports",
        "c.yaml line 1",
    ) and "No module named 'own_absent'" in str(imports)
    assert arch == Problem(
        "model.arch",
        "unknown model architecture 'own_model'; known: mini_gpt4, minigpt4, minigpt_v2. Add one in "
        "minigpt4/models/__init__.py, or in a module of your own that the configuration names under "
        "imports: [my_package.my_module], as docs/custom_data.md shows",
        "c.yaml line 3",
    )
    assert task.key == "run.task" and "imports: [" in task.message and seed.key == "run.sede"


# training with the user's own builder, model and task

OWN_CODE = """
import minigpt4
from minigpt4.common.registry import registry
from minigpt4.datasets.builders import CCSBUAlignBuilder
from minigpt4.models import MiniGPT4
from minigpt4.tasks import ImageTextPretrainTask

print("own code with minigpt4 of", minigpt4.__file__)


@registry.register_builder("own_builder")
class OwnBuilder(CCSBUAlignBuilder):
    def build_datasets(self):
        print("own builder")
        return super().build_datasets()


@registry.register_model("own_model")
class OwnModel(MiniGPT4):
    def forward(self, samples):
        out = super().forward(samples)
        return {**out, "loss": out["loss"] + 1000}


@registry.register_task("own_task")
class OwnTask(ImageTextPretrainTask):
    def train_step(self, model, samples):
        assert type(model).__name__ == "OwnModel"
        return super().train_step(model, samples) + 10000
"""
OWN_YAML = """
imports: [own_project.parts]
model: {arch: own_model, model_type: pretrain_vicuna}
datasets:
  mine:
    builder: own_builder
    vis_processor: {train: {name: blip2_image_train}}
run:
  task: own_task
  lr_sched: linear_warmup_cosine_lr
  init_lr: 1e-3
  min_lr: 1e-4
  weight_decay: 0.05
  max_epoch: 1
  iters_per_epoch: 2
  batch_size_train: 2
  num_workers: 1
  log_freq: 1
"""


def installed(folder):
    """Build a wheel of the project's files, install it below `folder`, and return (its content, its folder)."""
    pytest.importorskip("setuptools", minversion="77")
    source, wheels, target = folder / "source", folder / "wheels", folder / "installed"
    shutil.copytree(
        ROOT / "minigpt4", source / "minigpt4", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("train_configs", "eval_configs", "prompts"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "setup.py", "README.md", "requirements.txt"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(
        folder,
        [
            *pip,
            "wheel",
            "--no-deps",
            "--no-index",
            "--no-build-isolation",
            "-w",
            str(wheels),
            str(source),
        ],
    )
    (wheel,) = wheels.glob("*.whl")
    run(folder, [*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)])
    return set(zipfile.ZipFile(wheel).namelist()), target


def run(cwd, command, **env):
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize(
    "way", ["checkout, code beside the YAML file", "installed, code in the current folder"]
)
def test_a_builder_a_model_and_a_task_outside_the_repository_train(way, release, tmp_path):
    elsewhere, files = tmp_path / "elsewhere", tmp_path / "files"
    for folder in (elsewhere, files):
        folder.mkdir()
    (files / "c.yaml").write_text(OWN_YAML)
    program, env, home = ROOT / "train.py", {"TORCH_HOME": str(release.root / "torch")}, files
    if way.startswith("installed"):
        names, target = installed(tmp_path)
        for folder in ("configs", "quickstart/weights"):
            shipped = [file for file in (ROOT / "minigpt4" / folder).rglob("*") if file.is_file()]
            assert shipped and {str(file.relative_to(ROOT)) for file in shipped} <= names
        # a copy of train.py, so that it does not find the checkout's package beside it
        program, home, env["PYTHONPATH"] = shutil.copy(program, tmp_path), elsewhere, str(target)
    (home / "own_project").mkdir()
    (home / "own_project/parts.py").write_text(OWN_CODE)
    options = release.options(
        **{
            "run.output_dir": "output",
            "datasets.mine.build_info.storage": release.root / "cc_sbu_align",
        }
    )
    done = run(
        elsewhere,
        [sys.executable, str(program), "--cfg-path", str(files / "c.yaml"), *options],
        **env,
    )
    package = ROOT if home == files else Path(env["PYTHONPATH"])
    assert f"own code with minigpt4 of {package / 'minigpt4/__init__.py'}\n" in done.stdout
    assert "own builder\n" in done.stdout and '"own_project.parts"' in done.stderr
    (folder,) = (elsewhere / "output").iterdir()
    losses = [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 2 and all(11000 < loss < 11100 for loss in losses)
    saved = torch.load(folder / "checkpoint_0.pth", weights_only=True)
    assert (
        saved["config"]["imports"] == ["own_project.parts"]
        and saved["config"]["model"]["arch"] == "own_model"
    )
    assert set(saved["model"]) == {"llama_proj.weight", "llama_proj.bias"}


def test_a_module_that_is_imported_once_more_may_register_its_class_again(tmp_path, monkeypatch):
    """As after an error in the module, or in a notebook; another class of the same name is still refused."""
    (tmp_path / "own_again.py").write_text(
        "from minigpt4.common.registry import registry\nfrom minigpt4.tasks import BaseTask\n\n\n"
        "@registry.register_task('own_again')\nclass Again(BaseTask):\n    pass\n"
    )
    path = tmp_path / "c.yaml"
    path.write_text("imports: [own_again, own_again]\nmodel: {arch: own_model}\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for _ in range(2):
        with pytest.raises(ConfigError) as caught:
            Config(Namespace(cfg_path=path, options=["run.task=own_again"]))
        assert [problem.key for problem in caught.value.problems] == ["model.arch"]
        del sys.modules["own_again"]


def test_an_empty_list_of_imports_is_none(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("imports:\nmodel: {arch: own_model}\n")
    with pytest.raises(ConfigError) as caught:
        Config(Namespace(cfg_path=path, options=[]))
    assert [problem.key for problem in caught.value.problems] == ["model.arch"]
