"""A run beyond its training steps: resume, evaluation, data, messages and files; on a small real model."""

import json
import logging
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from minigpt4.common.checkpoint import CheckpointError
from minigpt4.common.cli import Interrupted
from minigpt4.runners import RunnerBase
from minigpt4.tasks import ImageTextPretrainTask
from tests.small_release import write_align_folder, write_shard
from tests.training import (
    Images,
    batches,
    dataset_sections,
    endless,
    runner,
    settings,
    tiny_model,
    trained,
    weights,
)

TIME = r"\d+:\d\d:\d\d"


# ---------------------------------------- resume, evaluate


def test_resumed_equals_uninterrupted(tmp_path):
    """Weights, moments and dropout: a run of 3 epochs equals one that is interrupted after the first and resumed."""
    dropped = {"dropout": 0.5}
    whole = trained(tmp_path / "whole", model=tiny_model(**dropped), max_epoch=3)
    checkpoint = whole.output_dir / "checkpoint_0.pth"
    torch.manual_seed(99)
    rest = trained(
        tmp_path / "rest",
        model=tiny_model(**dropped),
        start=6,
        max_epoch=3,
        resume_ckpt_path=str(checkpoint),
    )
    assert rest.start.epoch == 1
    assert torch.equal(weights(whole), weights(rest))
    for mine, other in zip(
        whole.optimizer.state.values(), rest.optimizer.state.values(), strict=True
    ):
        assert all(torch.equal(mine[key], other[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert sorted(path.name for path in rest.output_dir.iterdir()) == [
        "checkpoint_1.pth",
        "checkpoint_2.pth",
        "log.txt",
        "loss.png",
        "metrics.jsonl",
        "result",
        "run_card.json",
        "run_card.md",
    ]


def test_nothing_left_to_train_is_said_and_no_error(tmp_path, capsys):
    done = trained(tmp_path / "done")
    again = runner(settings(tmp_path / "again", resume_ckpt_path=str(done.last_checkpoint)))
    assert again.train() is None
    assert (
        "has finished epoch 1 and run.max_epoch is 2; raise run.max_epoch"
        in capsys.readouterr().out
    )
    assert not (tmp_path / "again").exists()


def test_resume_of_other_parameters_is_refused(tmp_path):
    done = trained(tmp_path / "done")
    model = tiny_model()
    model.visual_encoder.requires_grad_(True)
    with pytest.raises(
        CheckpointError, match=r"run.resume_ckpt_path: the optimizer state is of other parameters"
    ):
        trained(
            tmp_path / "other", model=model, resume_ckpt_path=str(done.last_checkpoint), max_epoch=5
        )
    assert not (tmp_path / "other").exists()


def test_a_changed_weight_decay_holds_after_a_resume_and_is_said(tmp_path, caplog):
    done = trained(tmp_path / "done")
    changes = {
        "resume_ckpt_path": str(done.last_checkpoint),
        "max_epoch": 3,
        "weight_decay": 0.2,
        "resume_mode": "restart",
    }
    run = trained(tmp_path / "more", **changes)
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.2, 0.0]
    assert "run.weight_decay: 0.2 from here on, the checkpoint had 0.05" in caplog.text


def test_evaluate_gives_the_mean_loss_of_the_checkpoint(tmp_path, caplog):
    done = trained(tmp_path / "done")
    images = batches(5, 1, seed=1)[0]["image"]
    changes = {"evaluate": True, "valid_splits": ["val"], "batch_size_eval": 2}
    cfg = settings(tmp_path / "eval", resume_ckpt_path=str(done.last_checkpoint), **changes)
    run = runner(cfg, datasets={"images": {"val": Images(images)}})
    with caplog.at_level(logging.INFO):
        losses = run.train()
    with torch.no_grad():
        expected = done.model({"image": images})["loss"].item()
    # float32 means of 2, 2 and 1 samples
    assert losses["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert json.loads((run.output_dir / "log.txt").read_text().splitlines()[-1]) == losses
    assert f"Evaluation on val: loss {losses['val_loss']:.4f}" in caplog.text
    cfg.run_cfg.valid_splits = ["test"]
    with pytest.raises(
        ValueError, match=r"no dataset has a split 'test' \(there are: images: val\)"
    ):
        run.train()


def test_evaluate_with_auto_needs_a_checkpoint(tmp_path):
    changes = {"evaluate": True, "valid_splits": ["val"], "batch_size_eval": 2}
    run = runner(settings(tmp_path, resume_ckpt_path="auto", **changes))
    with pytest.raises(
        CheckpointError, match=f"run.resume_ckpt_path: no checkpoint below .{tmp_path}"
    ):
        run.train()


def test_restarted_with_shorter_epochs_it_saves_within_the_next_one(tmp_path):
    changes = {"max_epoch": 1, "save_every_iters": 4}
    run = trained(tmp_path / "long", iters_per_epoch=10, **changes)
    path = str(run.output_dir / "checkpoint_0_iter_8.pth")
    changes = {"max_epoch": 2, "save_every_iters": 2}
    restart = {"resume_ckpt_path": path, "resume_mode": "restart"}
    rest = trained(tmp_path / "short", iters_per_epoch=7, **changes, **restart)
    assert (rest.output_dir / "checkpoint_1_iter_4.pth").exists()


class OwnLoop(RunnerBase):
    """A loop of a user's own that never calls `after_step`."""

    def train_epoch(self, epoch, metrics):
        for step in range(metrics.index, self.iters_per_epoch):
            lr = self.lr_scheduler.step(cur_epoch=epoch, cur_step=step)
            with metrics.fetching():
                batch = next(self.train_loader)
            loss = self.model(batch)["loss"]
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            metrics.add(loss, lr, batch)
            metrics.check()
            metrics.end_step()
        return metrics.end_epoch()


def test_a_signal_ends_a_loop_of_ones_own_at_the_end_of_its_epoch(tmp_path):
    run = runner(settings(tmp_path, max_epoch=3), kind=OwnLoop)

    def data():
        for number, batch in enumerate(endless(batches())):
            if number == 2:
                run.interruption.signal = signal.SIGTERM
            yield batch

    with pytest.raises(Interrupted, match=r"before epoch 1, step 0: saved .*checkpoint_0.pth"):
        run.train(data())


def test_validation_loss_is_in_the_log_of_every_epoch(tmp_path):
    images = batches(5, 1, seed=1)[0]["image"]
    cfg = settings(tmp_path, valid_splits=["val"], batch_size_eval=2)
    run = runner(cfg, datasets={"images": {"val": Images(images)}})
    run.train(endless(batches()))
    lines = [
        json.loads(line) for line in (run.output_dir / "log.txt").read_text().splitlines()[-2:]
    ]
    assert [sorted(line) for line in lines] == [["train_loss", "train_lr", "val_loss"]] * 2
    assert lines[1]["val_loss"] < lines[0]["val_loss"]


def test_epochs_of_equal_means_have_a_line_each(tmp_path):
    still = {"init_lr": 0.0, "min_lr": 0.0, "warmup_steps": 0, "weight_decay": 0.0}
    run = trained(tmp_path, max_epoch=3, iters_per_epoch=5, **still)
    first, *others = (run.output_dir / "log.txt").read_text().splitlines()[-3:]
    assert "train_loss" in first and others == [first] * 2


# ---------------------------------------- from datasets


def with_datasets(cfg, **storages):
    """Return the task's real datasets of a configuration with these `build_info.storage`."""
    cfg.datasets_cfg = dataset_sections(storages, "blip2_image_eval")
    return ImageTextPretrainTask().build_datasets(cfg)


def test_without_iters_per_epoch_an_epoch_is_a_pass_over_the_folder(tmp_path, capsys, caplog):
    write_align_folder(tmp_path / "align", 10)
    (tmp_path / "align" / "image" / "3.jpg").write_bytes(b"no image")
    cfg = settings(tmp_path / "out", iters_per_epoch=None, init_lr=1e-3, max_bad_fraction=0.5)
    run = runner(cfg, datasets=with_datasets(cfg, cc_sbu_align=tmp_path / "align"))
    with caplog.at_level(logging.INFO):
        run.train()
    # 10 samples in batches of 4: the last batch continues with the next pass
    assert run.iters_per_epoch == 3
    assert "Loaded 10 records for train split from the dataset." in caplog.text
    assert re.search(
        r"^cc_sbu_align: (\d+) of \d+ samples skipped \(\1 bad_image\)$",
        capsys.readouterr().out,
        flags=re.M,
    )
    steps = [
        json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()
    ]
    again = runner(cfg, datasets=run.datasets)
    again.train()
    assert torch.equal(weights(run), weights(again))  # same seed, same data
    changes = {
        "max_epoch": 3,
        "resume_ckpt_path": str(run.last_checkpoint),
        "resume_mode": "restart",
    }
    more = settings(tmp_path / "out", iters_per_epoch=3, **changes)
    rest = runner(more, datasets=run.datasets)
    rest.train()
    resumed = [
        json.loads(line) for line in (rest.output_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert [step["step"] for step in resumed] == [6, 7, 8] and len(steps) == 6


def test_streams_need_iters_per_epoch(tmp_path, capsys, caplog):
    write_shard(tmp_path / "00000.tar", range(12))
    cfg = settings(tmp_path / "out", iters_per_epoch=None)
    storages = {"laion": tmp_path / "00000.tar", "cc_sbu": tmp_path / "00000.tar"}
    with pytest.raises(
        ValueError, match=r"^run.iters_per_epoch: missing, and shards have no end \(laion, cc_sbu\)"
    ):
        with_datasets(cfg, **storages)
    cfg.run_cfg.iters_per_epoch, cfg.run_cfg.max_epoch = 8, 1
    run = runner(cfg, datasets=with_datasets(cfg, **storages))
    with caplog.at_level(logging.INFO):
        run.train()
    assert "Each batch is of one dataset, drawn by equal ratios" in caplog.text
    assert re.search(r"^laion: 0 of \d+ samples skipped$", capsys.readouterr().out, flags=re.M)


# ---------------------------------------- lines, files, folders


def test_lines_of_the_2023_shapes(tmp_path, capsys, caplog):
    with caplog.at_level(logging.INFO):
        run = trained(tmp_path, log_freq=4, iters_per_epoch=12, max_epoch=1)
    out, log = capsys.readouterr().out, [record.getMessage() for record in caplog.records]
    assert out.startswith(
        "llama_proj.weight\nllama_proj.bias\nnumber of trainable parameters: 14\n"
    )
    assert re.search(r"^visual_encoder +42 +0  float32  cpu$", out, flags=re.M)
    progress = re.findall(
        rf"^Train: data epoch: \[0\]  \[ *(\d+)/12\]  eta: {TIME}  lr: (\d\.\d{{6}})  loss: (\d+\.\d{{4}})"
        r"  time: \d+\.\d{4}  data: \d+\.\d{4}  max mem: \d+  [\d.]+k? samples/s  wait \d+%$",
        out,
        flags=re.M,
    )
    assert [int(step) for step, _, _ in progress] == [0, 4, 8, 11]
    assert "  [ 0/12]  " in out and "  [11/12]  " in out
    assert progress[0][1] == "0.001000"
    assert re.search(
        rf"^Train: data epoch: \[0\] Total time: {TIME} \(\d+\.\d{{4}} s / it\)$", out, flags=re.M
    )
    assert re.search(rf"^Training time {TIME}$", out, flags=re.M)
    assert (
        f"Next: use these weights by --options model.ckpt={run.output_dir}/checkpoint_0.pth" in out
    )
    assert log[:2] == ["No validation splits found.", "Start training"]
    assert log[2] == "Start training epoch 0, 12 iters per inner epoch."
    assert re.fullmatch(r"Averaged stats: lr: \d\.\d{4}  loss: \d+\.\d{4}", log[3])
    assert log[4] == f"Saving checkpoint at epoch 0 to {run.output_dir}/checkpoint_0.pth."
    assert len(log) == 5


def test_log_and_metrics_hold_numbers(tmp_path):
    run = trained(tmp_path)
    config, end = json.JSONDecoder().raw_decode(text := (run.output_dir / "log.txt").read_text())
    assert config == run.config.to_dict()
    epochs = [json.loads(line) for line in text[end:].strip().splitlines()]
    steps = [
        json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert [step["step"] for step in steps] == list(range(12))
    assert [step["samples"] for step in steps] == list(range(4, 52, 4))
    assert set(steps[0]) == {
        *("step", "epoch", "lr", "samples", "seconds", "data_seconds", "loss", "memory_mib"),
        *("batch_samples", "batch_tokens", "samples_per_s", "tokens_per_s", "data_wait"),
    }
    for epoch, stats in enumerate(epochs):
        of_epoch = [step for step in steps if step["epoch"] == epoch]
        assert list(stats) == ["train_lr", "train_loss"]
        for key in ("lr", "loss"):
            mean = sum(step[key] for step in of_epoch) / len(of_epoch)
            assert stats[f"train_{key}"] == pytest.approx(mean, rel=1e-12)
    assert len(epochs) == 2


def test_every_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [trained("out", max_epoch=1).output_dir for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(
        re.fullmatch(r"\d{12}(-\d)?", folder.name) and folder.parent == Path("out")
        for folder in folders
    )
    named = runner(settings("out", max_epoch=1))
    named.job_id = "mine"
    named.train(endless(batches()))
    assert named.output_dir == Path("out/mine") and (named.output_dir / "result").is_dir()


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"run.output_dir: cannot make a folder in '.*/file/below'"):
        trained(tmp_path / "file" / "below")


def test_a_checkpoint_that_cannot_be_written_costs_a_warning_and_at_the_end_an_error(
    tmp_path, caplog
):
    run = runner(settings(tmp_path))

    def lose_the_folder():
        for number, batch in enumerate(endless(batches())):
            if number == 2:
                shutil.rmtree(run.output_dir)
                run.output_dir.write_text("a file in its place")
            yield batch

    with pytest.raises(OSError, match="the last epoch's checkpoint could not be written"):
        run.train(lose_the_folder())
    assert caplog.text.count("checkpoint not saved to") == 2
    assert caplog.text.count("training goes on without it") == 1
