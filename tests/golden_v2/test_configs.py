"""The newest release's YAML files, merged: their sections `datasets`, `run` and `evaluation_datasets` with only paths
changed, around a small model of ours."""

import json
from argparse import Namespace

import pytest
import yaml

from minigpt4 import train
from minigpt4.common.cli import run_program
from minigpt4.common.config import Config
from minigpt4.datasets.builders.instruction_builder import SOURCES
from minigpt4.evaluation.run import open_benchmarks
from minigpt4.tasks import ImageTextPretrainTask
from tests.datasets.instruction_files import write_all
from tests.evaluation.benchmarks import official
from tests.golden_v2 import read

CONFIGS = read("j_configs/merged.json", {"configs": {}})["configs"]
pytestmark = pytest.mark.skipif(not CONFIGS, reason="this set of fixtures has no j_configs")
TRAINING = [name for name in CONFIGS if name.startswith("train_configs/")]


@pytest.fixture
def small(release, tmp_path, monkeypatch):
    """Return a maker of YAML files: the sections of one of the release's, its paths and its model changed."""
    monkeypatch.setenv("TORCH_HOME", str(release.root / "torch"))
    infos = write_all(tmp_path / "data")
    infos |= {
        name: {"storage": f"{release.root}/{name}_dataset/*.tar"} for name in ("laion", "cc_sbu")
    }
    infos["cc_sbu_align"] = {"storage": str(release.root / "cc_sbu_align")}

    def make(name, **run):
        content = json.loads(json.dumps(CONFIGS[name]))
        model = {
            "arch": "mini_gpt4",
            "model_type": "pretrain_vicuna",
            "llama_model": str(release.llama),
        }
        model |= {
            "ckpt": str(release.checkpoint),
            "end_sym": "###",
            "prompt_template": "###Human: {} ###Assistant: ",
        }
        content["model"] = model
        for dataset, section in content["datasets"].items():
            section["build_info"] = infos[dataset]
            section["vis_processor"]["train"].pop("image_size")  # the small model's is another
        content["run"] |= {"device": "cpu", "output_dir": str(tmp_path / "output"), **run}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return make


@pytest.mark.parametrize("name", TRAINING)
def test_a_dry_run_passes(name, small, capsys):
    args = train.parse_args(["--cfg-path", str(small(name)), "--dry-run"])
    assert run_program(train.train, args) == 0, capsys.readouterr().err
    sizes = [section["batch_size"] for section in CONFIGS[name]["datasets"].values()]
    assert f" process(es) x {max(sizes)} samples a step" in capsys.readouterr().out


def test_all_22_datasets_are_built_and_mixed_as_the_file_says(small):
    (name,) = (name for name in TRAINING if len(CONFIGS[name]["datasets"]) == len(SOURCES))
    cfg = Config(Namespace(cfg_path=small(name, num_workers=0), options=None), for_training=True)
    datasets = ImageTextPretrainTask().build_datasets(cfg)
    loader = ImageTextPretrainTask().build_train_loader(datasets, cfg.run_cfg)
    total = sum(section["sample_ratio"] for section in CONFIGS[name]["datasets"].values())
    for (dataset, section), ratio in zip(
        CONFIGS[name]["datasets"].items(), loader.ratios, strict=True
    ):
        assert datasets[dataset]["train"].batch_size == section["batch_size"]
        assert ratio == pytest.approx(section["sample_ratio"] / total)
    batch = next(loader)
    name = batch["sample_id"][0].partition("/")[0]
    assert (
        len(batch["sample_id"])
        == CONFIGS["train_configs/minigptv2_finetune.yaml"]["datasets"][name]["batch_size"]
    )


def test_its_sections_of_benchmarks_are_read(small, tmp_path):
    (name,) = (name for name in CONFIGS if CONFIGS[name].get("evaluation_datasets"))
    known = {"refcoco", "refcoco+", "refcocog", "gqa", "okvqa", "vizwiz", "vsr", "hm", "iconvqa"}
    sections = CONFIGS[name]["evaluation_datasets"]
    options = []
    for benchmark in known & set(sections):
        root = tmp_path / benchmark
        writer = getattr(official, {"iconvqa": "iconqa"}.get(benchmark, benchmark), None)
        files = official.refcoco(root, benchmark) if "refcoco" in benchmark else writer(root)
        paths = {"img_path": root / "images", **files}
        options += [
            f"evaluation_datasets.{benchmark}.{key}={value}" for key, value in paths.items()
        ]
    cfg = Config(Namespace(cfg_path=small(name), options=options))
    opened = open_benchmarks(cfg, sorted(known & set(sections)))
    assert len(opened) == len(known)
    for benchmark, (made, items) in opened.items():
        assert items
        assert made.cfg.batch_size == sections[benchmark]["batch_size"]
        assert made.cfg.max_new_tokens == sections[benchmark]["max_new_tokens"]
