"""No program uses what its libraries will remove: with today's releases nothing is said of it."""

import logging
import warnings

import pytest

from minigpt4 import evaluate, train
from minigpt4.common.config import Config
from minigpt4.datasets import inspect


@pytest.fixture
def no_deprecation(caplog):
    """Turn warnings of what is to be removed into errors; let transformers' own log say nothing of it, either."""
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        for kind in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("error", kind)
        yield
    assert not [
        text for text in caplog.messages if "deprecat" in text.lower() or "will be removed" in text
    ]


def test_training_looking_and_answering_warn_of_nothing(
    release, tmp_path, monkeypatch, no_deprecation
):
    monkeypatch.setenv("TORCH_HOME", str(release.root / "torch"))
    options = release.options(**{"model.ckpt": release.checkpoint, "run.num_workers": 0})[1:]
    options += [f"datasets.cc_sbu_align.build_info.storage={release.root}/cc_sbu_align"]
    yaml = ["--cfg-path", "train_configs/minigpt4_stage2_finetune.yaml"]
    settings = [
        "run.iters_per_epoch=1",
        "run.max_epoch=1",
        "run.batch_size_train=2",
        f"run.output_dir={tmp_path}/out",
    ]
    settings += [
        "run.valid_splits=[val]",
        "run.batch_size_eval=2",
        "datasets.cc_sbu_align.val_fraction=0.3",
    ]
    assert train.main([*yaml, "--dry-run", "--options", *options, *settings]) == 0
    assert train.main([*yaml, "--options", *options, *settings]) == 0
    look = ["--output", str(tmp_path / "sheet.html"), "--options", *options]
    assert inspect.inspect(inspect.parse_args([*yaml, *look])) == 0
    ask = [
        "--cfg-path",
        "eval_configs/minigpt4_eval.yaml",
        "--images",
        str(release.root / "cc_sbu_align/image/0.jpg"),
    ]
    ask += ["--output", str(tmp_path / "a.jsonl"), "--max-new-tokens", "3", "--options", *options]
    assert evaluate.main(ask) == 0
    assert (tmp_path / "a.jsonl").read_text().count('"answer"') == 1


def test_values_of_another_type_are_converted_without_a_warning(release, tmp_path, no_deprecation):
    """As numbers for text, and text for numbers."""
    path = tmp_path / "c.yaml"
    path.write_text(
        f"model: {{arch: mini_gpt4, end_sym: 5, max_txt_len: '7', check_llm: 'no', llama_model: {release.llama}}}"
    )
    args = train.parse_args(
        [
            "--cfg-path",
            str(path),
            "--options",
            "model.model_type=pretrain_vicuna",
            "run.init_lr='1e-4'",
        ]
    )
    cfg = Config(args)
    assert (cfg.model_cfg.end_sym, cfg.model_cfg.max_txt_len, cfg.model_cfg.check_llm) == (
        "5",
        7,
        False,
    )
    assert cfg.run_cfg.init_lr == 1e-4
