"""An interrupted run resumes as if it had not been interrupted; settings that would change its results are refused."""

import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from minigpt4.common.checkpoint import CheckpointError
from minigpt4.runners.run_state import Progress
from minigpt4.tasks import ImageTextPretrainTask
from tests.small_release import write_align_folder, write_shard
from tests.training import (
    ROOT,
    Images,
    TinyModel,
    batches,
    dataset_sections,
    runner,
    settings,
    tiny_model,
)

SHORT = {
    "iters_per_epoch": 7,
    "save_every_iters": 2,
    "num_workers": 2,
    "init_lr": 1e-3,
    "resume_ckpt_path": "auto",
}


@pytest.fixture
def storages(tmp_path):
    """A dataset with a broken shard, a second one, and a folder with a broken image."""
    for name, shards in (("laion", 3), ("cc_sbu", 2)):
        (tmp_path / name).mkdir()
        for number in range(shards):
            write_shard(tmp_path / name / f"{number}.tar", range(10 * number, 10 * number + 10))
    (tmp_path / "laion" / "1.tar").write_bytes(b"no tar")
    write_align_folder(tmp_path / "align", 9)
    (tmp_path / "align" / "image" / "3.jpg").write_bytes(b"no image")
    return {
        "laion": tmp_path / "laion/*.tar",
        "cc_sbu": tmp_path / "cc_sbu/*.tar",
        "cc_sbu_align": tmp_path / "align",
    }


def new_runner(output, storages, model=None, **changes):
    """Return a runner on real datasets, by default of a model with dropout."""
    cfg = settings(output, **{**SHORT, **changes})
    cfg.datasets_cfg = dataset_sections(storages, "blip2_image_train")
    cfg.to_dict = lambda: {
        "run": OmegaConf.to_container(cfg.run_cfg),
        "datasets": OmegaConf.to_container(cfg.datasets_cfg),
    }
    return runner(
        cfg, model or tiny_model(dropout=0.5), ImageTextPretrainTask().build_datasets(cfg)
    )


class Cut(Exception):
    """Interrupts a run."""


def cut_at(run, step):
    """Train until just before step `step`, counted over all epochs of this process."""
    train_step, left = run.task.train_step, iter(range(step))

    def counted(model, samples):
        if next(left, None) is None:
            raise Cut
        return train_step(model, samples)

    run.task.train_step = counted
    with pytest.raises(Cut):
        run.train()


def steps_of(run):
    """Return {step: loss}; check that a step that was trained twice had the same loss."""
    lines = [
        json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()
    ]
    found = {}
    for line in lines:
        assert found.setdefault(line["step"], line["loss"]) == line["loss"]
    return found


def epoch_lines(run):
    return [
        line
        for line in (run.output_dir / "log.txt").read_text().splitlines()
        if line.startswith('{"train')
    ]


def tensors(run):
    moments = [value for state in run.optimizer.state.values() for value in state.values()]
    return [parameter.detach() for parameter in run.trainable] + moments


@pytest.mark.parametrize(
    "changes",
    [{}, {"accum_grad_iters": 3}, {"accum_grad_iters": 3, "accum_reduction": "sum"}],
    ids=["plain", "accumulated", "left-over gradients"],
)
def test_resumed_within_an_epoch_equals_uninterrupted(tmp_path, storages, changes, capsys):
    whole = new_runner(tmp_path / "whole", storages, **changes)
    whole.train()
    skipped = [line for line in capsys.readouterr().out.splitlines() if "samples skipped" in line]
    for cut in (3, 6, 4, 30):
        run = new_runner(tmp_path / "cut", storages, **changes)
        if cut < 30:
            cut_at(run, cut)
        else:
            run.train()
    assert all(
        torch.equal(mine, other) for mine, other in zip(tensors(whole), tensors(run), strict=True)
    )
    assert steps_of(run) == steps_of(whole) and list(steps_of(whole)) == list(range(14))
    assert epoch_lines(run) == epoch_lines(whole)
    assert [
        line for line in capsys.readouterr().out.splitlines() if "samples skipped" in line
    ] == skipped
    assert len(list((tmp_path / "cut").iterdir())) == 1
    # some steps were trained twice
    assert (run.output_dir / "metrics.jsonl").read_text().count("\n") > 14


class DrawsInEvaluation(TinyModel):
    """Draws random numbers from every generator in evaluation mode."""

    def forward(self, samples):
        outputs = super().forward(samples)
        if not self.training:
            outputs["loss"] = outputs["loss"] + torch.rand(()) + np.random.rand() + random.random()
        return outputs


def validated(output, storages, **changes):
    """Return a runner whose model draws random numbers, also in its validation on four samples."""
    torch.manual_seed(0)
    run = new_runner(output, storages, DrawsInEvaluation(dropout=0.5), **changes)
    run.datasets["held_out"] = {
        "val": Images(batches(4, 1, seed=1)[0]["image"].unflatten(1, (1, 1, -1)))
    }
    return run


def test_validation_touches_nothing_and_is_the_same_when_resumed(tmp_path, storages):
    plain = validated(tmp_path / "plain", storages)
    plain.train()
    whole = validated(tmp_path / "whole", storages, valid_splits=["val"], batch_size_eval=2)
    whole.train()
    assert all(
        torch.equal(mine, other) for mine, other in zip(tensors(plain), tensors(whole), strict=True)
    )
    before = torch.get_rng_state(), (random.getstate(), np.random.get_state()[1].tolist())
    # the random numbers that the model draws there affect nothing else
    whole.validation.measure(whole.validation.loaders)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1]
    lines = [json.loads(line) for line in epoch_lines(whole)]
    assert len({line.pop("val_loss") for line in lines}) == 2 and lines == list(
        map(json.loads, epoch_lines(plain))
    )
    for cut in (5, 4, 30):
        run = validated(tmp_path / "cut", storages, valid_splits=["val"], batch_size_eval=2)
        run.train() if cut == 30 else cut_at(run, cut)
    assert all(
        torch.equal(mine, other) for mine, other in zip(tensors(whole), tensors(run), strict=True)
    )
    assert epoch_lines(run) == epoch_lines(whole)


def test_a_checkpoint_with_settings_of_programs_before_resumes_exactly(cut_run):
    """They saved the resolved precision where the user's file has `auto`, and compiled nothing unless told to."""
    saved = torch.load(cut_run.output_dir / "checkpoint_0_iter_4.pth", weights_only=True)
    ours = cut_run.config.to_dict() | {"model": {"llm_precision": "auto", "compile": None}}
    cut_run.config.to_dict = lambda: ours
    for theirs, differs in (("fp32", False), ("auto", False), ("bf16", True)):
        saved["config"]["model"] = {"llm_precision": theirs, "compile": False}
        saved["config"]["run"] |= {"rank": 0, "gpu": None, "dist_backend": "gloo"}
        lines = Progress.of_checkpoint(saved).differences(cut_run)
        assert lines == ["model.llm_precision: 'fp32', the checkpoint has 'bf16'"] * differs


def test_progress_is_read_and_written_in_one_form(cut_run):
    saved = torch.load(cut_run.output_dir / "checkpoint_0_iter_4.pth", weights_only=True)
    assert list(saved["progress"]) == ["position", "setup", "ranks", "identity", "stats", "best"]
    assert list(saved["progress"]["ranks"][0]) == ["rng", "data", "metrics", "gradients"]
    progress = Progress.of_checkpoint(saved)
    assert progress.to_plain() == saved["progress"] and progress.samples_seen == 16
    del saved["progress"]
    assert Progress.of_checkpoint(saved) is None


def test_the_last_two_checkpoints_within_epochs_are_kept_and_all_at_their_ends(tmp_path, storages):
    run = new_runner(tmp_path, storages)
    run.train()
    names = sorted(path.name for path in run.output_dir.glob("*.pth"))
    assert names == [
        "checkpoint_0.pth",
        "checkpoint_1.pth",
        "checkpoint_1_iter_4.pth",
        "checkpoint_1_iter_6.pth",
    ]
    within = torch.load(run.output_dir / "checkpoint_1_iter_4.pth", weights_only=True)
    # the last finished epoch: the loader of 2023 would start with epoch 1
    assert within["epoch"] == 0
    assert within["progress"]["position"] == {"epoch": 1, "step": 4}


DAMAGES = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-3000]),
    "empty": lambda path: path.write_bytes(b""),
    "one bit": lambda path: path.write_bytes(
        path.read_bytes().replace(b"blip2_image_train", b"blip3_image_train")
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, storages, damage, caplog):
    whole = new_runner(tmp_path / "whole", storages)
    whole.train()
    run = new_runner(tmp_path / "cut", storages)
    cut_at(run, 5)
    DAMAGES[damage](run.output_dir / "checkpoint_0_iter_4.pth")
    again = new_runner(tmp_path / "cut", storages)
    again.train()
    assert again.resumed_from.name == "checkpoint_0_iter_2.pth"
    assert "checkpoint_0_iter_4.pth' is " in caplog.text and "trying the one before" in caplog.text
    assert all(
        torch.equal(mine, other) for mine, other in zip(tensors(whole), tensors(again), strict=True)
    )
    for path in again.output_dir.glob("*.pth"):
        DAMAGES[damage](path)
    with pytest.raises(
        CheckpointError, match=r"none of the 4 checkpoints below '.*cut' can be read"
    ):
        new_runner(tmp_path / "cut", storages).train()


@pytest.fixture
def cut_run(tmp_path, storages):
    run = new_runner(tmp_path / "out", storages)
    cut_at(run, 5)
    return run


def test_other_settings_are_refused_with_the_keys_that_differ(tmp_path, storages, cut_run):
    write_shard(tmp_path / "laion" / "3.tar", range(90, 95))
    other = new_runner(
        tmp_path / "out",
        storages,
        num_workers=1,
        init_lr=0.5,
        iters_per_epoch=8,
        log_freq=3,
        read_ahead=True,
    )
    with pytest.raises(CheckpointError) as caught:
        other.train()
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("run.resume_ckpt_path: '") and lines[0].endswith(
        "cannot be resumed exactly:"
    )
    assert [line.split(": ")[0].strip() for line in lines[1:-1]] == [
        "run.init_lr",
        "run.num_workers",
        "steps an epoch",
        "listing.datasets.laion",
    ]
    assert "  run.num_workers: 1, the checkpoint has 2" in lines
    assert lines[-1].endswith("--options run.resume_mode=restart")
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_another_world_size_is_refused(tmp_path, storages, cut_run):
    path = cut_run.output_dir / "checkpoint_0_iter_4.pth"
    state = torch.load(path, weights_only=True)
    state["progress"]["setup"]["world size"] = 4
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="world size: 1, the checkpoint has 4"):
        new_runner(tmp_path / "out", storages).train()


def test_restart_takes_over_weights_and_schedule_in_a_new_folder(tmp_path, storages, cut_run):
    other = new_runner(tmp_path / "out", storages, num_workers=0, resume_mode="restart")
    other.train()
    assert other.output_dir != cut_run.output_dir
    assert list(steps_of(other)) == list(range(4, 14))
    assert not set(steps_of(other).values()) & set(steps_of(cut_run).values())


def test_moved_data_and_more_epochs_are_no_other_settings(tmp_path, storages, cut_run):
    (tmp_path / "cc_sbu").rename(tmp_path / "elsewhere")
    other = new_runner(
        tmp_path / "out", {**storages, "cc_sbu": tmp_path / "elsewhere/*.tar"}, max_epoch=3
    )
    other.train()
    assert other.output_dir == cut_run.output_dir
    assert list(steps_of(other)) == list(range(21))


def test_what_the_vision_tower_gives_by_now_is_no_other_setting(cut_run):
    saved = torch.load(cut_run.output_dir / "checkpoint_0_iter_4.pth", weights_only=True)
    ours = cut_run.config.to_dict() | {"imports": ["own.code"]}
    ours["datasets"]["laion"]["vis_processor"]["train"]["mean"] = [0.5, 0.5, 0.5]
    cut_run.config.to_dict = lambda: ours
    assert Progress.of_checkpoint(saved).differences(cut_run) == []
    saved["config"]["datasets"]["laion"]["vis_processor"]["train"]["mean"] = [0.4, 0.4, 0.4]
    assert Progress.of_checkpoint(saved).differences(cut_run) == [
        "datasets.laion.vis_processor.train.mean: [0.5, 0.5, 0.5], the checkpoint has [0.4, 0.4, 0.4]"
    ]


def test_other_frozen_weights_are_another_setting_their_names_are_not(cut_run):
    saved = torch.load(cut_run.output_dir / "checkpoint_0_iter_4.pth", weights_only=True)
    cut_run.model.identity = lambda: {
        "vision": {"vit_ckpt": {"name": "moved.pth", "fingerprint": "1a"}}
    }
    # the checkpoint is from before fingerprints were saved
    assert Progress.of_checkpoint(saved).differences(cut_run) == []
    for theirs in ("1a", "2b"):
        saved["progress"]["identity"] = {
            "vision": {"vit_ckpt": {"name": "eva.pth", "fingerprint": theirs}}
        }
        lines = Progress.of_checkpoint(saved).differences(cut_run)
        words = ["model.vision.vit_ckpt.fingerprint: '1a', the checkpoint has '2b'"]
        assert lines == words * (theirs == "2b")


def test_a_checkpoint_of_the_five_keys_of_2023_is_gone_on_with_after_its_epoch(
    tmp_path, storages, cut_run
):
    state = torch.load(cut_run.output_dir / "checkpoint_0_iter_4.pth", weights_only=True)
    old = {key: state[key] for key in ("model", "optimizer", "config", "scaler")} | {"epoch": 0}
    torch.save(old, tmp_path / "old.pth")
    run = new_runner(
        tmp_path / "new", storages, resume_ckpt_path=str(tmp_path / "old.pth"), num_workers=0
    )
    run.train()
    assert list(steps_of(run)) == list(range(7, 14))


def test_a_run_that_was_killed_after_its_last_checkpoint_says_its_last_words(
    tmp_path, storages, capsys
):
    run = new_runner(tmp_path, storages)
    run.train()
    said = [line for line in capsys.readouterr().out.splitlines() if "samples skipped" in line]
    lines = (run.output_dir / "log.txt").read_text().splitlines(keepends=True)
    # killed while it wrote the line
    (run.output_dir / "log.txt").write_text("".join(lines[:-1]) + lines[-1][:10])
    new_runner(tmp_path, storages).train()
    assert (run.output_dir / "log.txt").read_text().endswith("\n" + lines[-1])
    out = capsys.readouterr().out
    assert "has finished epoch 1 and run.max_epoch is 2" in out
    assert [line for line in out.splitlines() if "samples skipped" in line] == said
    before = (run.output_dir / "log.txt").read_text()
    new_runner(tmp_path, storages).train()
    assert (run.output_dir / "log.txt").read_text() == before


SECRET = "hunter2-0123456789"


def test_no_secret_is_written_anywhere(release, tmp_path):
    good = [f"{release.root}/laion_dataset/{{00000..00001}}.tar"]
    good.append(f"http://user:{SECRET}@127.0.0.1:9/2.tar?signature={SECRET}")
    good.append("http://user:${oc.env:TOKEN}@127.0.0.1:9/{0..1}.tar?signature=${oc.env:TOKEN}")
    yaml = OmegaConf.load(ROOT / "train_configs/minigpt4_stage1_pretrain.yaml")
    del yaml.datasets.cc_sbu
    OmegaConf.update(yaml, "datasets.laion.build_info.storage", good)
    yaml.run.merge_with(
        {
            "iters_per_epoch": 6,
            "max_epoch": 1,
            "batch_size_train": 4,
            "num_workers": 0,
            "world_size": 1,
            "amp": False,
        }
    )
    OmegaConf.save(yaml, tmp_path / "secret.yaml")
    options = release.options(**{"run.output_dir": tmp_path / "out", "run.max_bad_fraction": 0.9})
    result = subprocess.run(
        [sys.executable, "train.py", "--cfg-path", str(tmp_path / "secret.yaml"), *options],
        cwd=ROOT,
        env={**release.env, "TOKEN": SECRET},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    # one of the three is named, without its secrets
    assert re.search(r"skipped http://127\.0\.0\.1:9/\d\.tar: bad_shard", result.stderr)
    assert '"http://127.0.0.1:9/2.tar"' in result.stderr
    assert "${oc.env:TOKEN}" in result.stderr
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        *(
            "checkpoint_0.pth",
            "log.txt",
            "loss.png",
            "metrics.jsonl",
            "run_card.json",
            "run_card.md",
        ),
    }
    for content in [
        result.stdout.encode(),
        result.stderr.encode(),
        *(path.read_bytes() for path in files),
    ]:
        assert SECRET.encode() not in content
