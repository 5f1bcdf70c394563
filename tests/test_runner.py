"""The step, the run around it, and what it says and writes; on a small real model."""

import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import Dataset

from minigpt4.common.checkpoint import CheckpointError
from minigpt4.common.dist_utils import derived_seed, launch_problems, launched_processes, setup_seeds
from minigpt4.common.logger import NonFiniteLossError
from minigpt4.common.registry import RegistryError, registry
from minigpt4.runners import RunnerBase
from minigpt4.tasks import ImageTextPretrainTask, setup_task
from tests.small_release import write_align_folder, write_shard
from tests.training import batches, endless, runner, settings, tiny_model

ROOT = Path(__file__).resolve().parents[1]
TIME = r"\d+:\d\d:\d\d"


def trained(tmp_path, fixed=None, model=None, start=0, **changes):
    run = runner(settings(tmp_path, **changes), model)
    run.train(endless(fixed or batches(), start))
    return run


def weights(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.trainable])


def digest(module):
    content = b"".join(name.encode() + value.numpy().tobytes() for name, value in module.state_dict().items())
    return hashlib.sha256(content).hexdigest()


# ---------------------------------------- the step


def test_accumulation_equals_the_large_batch(tmp_path):
    data = torch.cat([batch["image"] for batch in batches(8, 6)])
    flat = {"warmup_lr": 0.05, "min_lr": 0.05, "max_epoch": 1}  # one lr, for the schedule counts micro-steps
    found = []
    for accum in (1, 2, 4):
        fixed = [{"image": images, "text_input": [""] * len(images)} for images in data.split(8 // accum)]
        changes = {"iters_per_epoch": 6 * accum, "accum_grad_iters": accum}
        found.append(weights(trained(tmp_path, fixed, **flat, **changes)))
    found.append(weights(trained(tmp_path, fixed, **flat, **changes, max_tokens_per_batch=1)))
    moved = (found[0] - weights(runner(settings(tmp_path)))).abs().max()
    assert moved > 0.1
    for other in found[1:]:  # float32 sums in another order: 1e-7 each, over 6 steps
        assert (found[0] - other).abs().max() < 1e-6


def by_hand(groups, lr):
    """Return the weights after one AdamW step for each group of batches, of the mean of their losses."""
    model = tiny_model()
    decay = [{"params": [model.llama_proj.weight], "weight_decay": 0.05}]
    optimizer = torch.optim.AdamW([*decay, {"params": [model.llama_proj.bias], "weight_decay": 0.0}], lr=lr)
    for divisor, group in groups:
        optimizer.zero_grad()
        (sum(model(batch)["loss"] for batch in group) / divisor).backward()
        optimizer.step()
    return torch.cat([model.llama_proj.weight.detach().flatten(), model.llama_proj.bias.detach()])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_what_an_epoch_leaves_over(tmp_path, reduction):
    """mean: the rest of an epoch is stepped with its own mean; sum: it goes into the next epoch's first step."""
    fixed = batches(scale=0.01)  # small gradients, so that AdamW's epsilon makes sum and mean differ
    changes = {"warmup_lr": 0.05, "min_lr": 0.05, "iters_per_epoch": 3, "accum_grad_iters": 2}
    run = trained(tmp_path, fixed, accum_reduction=reduction, **changes)
    a, b, c, d, e = fixed
    mean = [(2, [a, b]), (1, [c]), (2, [d, e]), (1, [a])]
    total = [(1, [a, b]), (1, [c, d, e])]
    expected = by_hand(mean if reduction == "mean" else total, lr=0.05)
    assert (weights(run) - expected).abs().max() < 1e-6
    assert (weights(run) - by_hand(total if reduction == "mean" else mean, lr=0.05)).abs().max() > 1e-3


def test_clipping_bounds_the_gradient_that_adamw_sees(tmp_path):
    one_step = {"max_epoch": 1, "iters_per_epoch": 1, "beta2": 0.9}
    free, clipped = trained(tmp_path, **one_step), trained(tmp_path, max_grad_norm=0.01, **one_step)

    def gradient_norm(run):  # the first moment after one step is 0.1 of the gradient
        moments = [state["exp_avg"] for state in run.optimizer.state.values()]
        return 10 * torch.cat([moment.flatten() for moment in moments]).norm()

    assert gradient_norm(free) > 0.1
    assert gradient_norm(clipped) == pytest.approx(0.01, rel=1e-3)


def test_only_the_projection_changes(tmp_path):
    model = tiny_model()
    before = digest(model.visual_encoder), digest(model.llama_proj)
    trained(tmp_path, model=model)
    assert digest(model.visual_encoder) == before[0]
    assert digest(model.llama_proj) != before[1]


def with_nan(fixed, index=3):
    """Return batches of which one has a loss of nan."""
    bad = {"image": fixed[index]["image"] * float("nan"), "text_input": ["a"], "sample_id": ["00017.tar/000123"]}
    return [*fixed[:index], bad, *fixed[index + 1 :]]


@pytest.mark.parametrize("accum", [1, 2])
def test_a_loss_of_nan_costs_one_update(tmp_path, accum, caplog, capsys):
    changes = {"max_epoch": 1, "iters_per_epoch": 6, "accum_grad_iters": accum, "warmup_lr": 0.05, "min_lr": 0.05}
    run = trained(tmp_path, with_nan(batches(number=6)), **changes)
    a, b, c, _, e, f = batches(number=6)
    groups = [(1, [a]), (1, [b]), (1, [c]), (1, [e]), (1, [f])] if accum == 1 else [(2, [a, b]), (2, [e, f])]
    assert (weights(run) - by_hand(groups, lr=0.05)).abs().max() < 1e-6
    assert "step 3: loss is nan on rank 0 (samples 00017.tar/000123); optimizer not stepped" in caplog.text
    assert "step 3: update skipped on all ranks, 1 in a row, 1 so far" in capsys.readouterr().out
    steps = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [step["loss"] is None for step in steps] == [False, False, False, True, False, False]
    log = json.loads((run.output_dir / "log.txt").read_text().splitlines()[-1])
    assert log["train_loss"] == pytest.approx(sum(step["loss"] or 0 for step in steps) / 5, rel=1e-12)


def test_a_gradient_that_is_not_finite_costs_one_update(tmp_path, capsys):
    """The loss is finite; its gradient, 1 / (2 sqrt 0), is not."""
    model, calls = tiny_model(), []

    class Root(torch.nn.Module):
        def forward(self, x):
            calls.append(1)
            return x + (x * 0).abs().sqrt() if len(calls) == 4 else x

    model.dropout = torch.nn.Identity()
    model.llama_proj.register_forward_hook(lambda module, args, result: Root()(result))
    run = trained(tmp_path, model=model)
    assert torch.isfinite(weights(run)).all()
    assert "step 3: update skipped on all ranks, 1 in a row, 1 so far" in capsys.readouterr().out


def test_losses_of_nan_in_a_row_end_the_run_before_the_weights_are_touched(tmp_path):
    fixed = with_nan(batches())
    run = runner(settings(tmp_path, max_skipped_updates=1))
    message = r"step 3: loss is nan on rank 0 \(samples 00017.tar/000123\); optimizer not stepped; 1 in a row"
    with pytest.raises(NonFiniteLossError, match=message):
        run.train(endless(fixed))
    assert torch.isfinite(weights(run)).all()
    assert not list(run.output_dir.glob("*.pth"))


def too_large_for_the_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def too_large_for_the_machine():
    torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize(
    "allocate, begins",
    [
        (too_large_for_the_gpu, "the GPU is full (CUDA out of memory)"),
        (too_large_for_the_machine, f"the memory of the machine is full (tried to allocate {2**60} bytes)"),
    ],
)
def test_full_memory_is_explained_with_the_settings_that_help(tmp_path, allocate, begins):
    cfg = settings(tmp_path, batch_size_train=64)
    cfg.pretty_print = lambda: None
    with pytest.raises(MemoryError) as caught, RunnerBase.launched(cfg):
        allocate()
    message = str(caught.value)
    assert message.startswith(begins) and "run.batch_size_train (now 64)" in message
    for key in (
        "run.accum_grad_iters",
        "model.llm_quantization=int8",
        "model.max_txt_len",
        "model.use_grad_checkpoint",
    ):
        assert key in message


# ---------------------------------------- resume, evaluate


def test_resumed_equals_uninterrupted(tmp_path):
    """Weights, moments and dropout: the run of 3 epochs equals that of 3 epochs cut after the first."""
    dropped = {"dropout": 0.5}
    whole = trained(tmp_path / "whole", model=tiny_model(**dropped), max_epoch=3)
    checkpoint = whole.output_dir / "checkpoint_0.pth"
    torch.manual_seed(99)
    rest = trained(
        tmp_path / "rest", model=tiny_model(**dropped), start=6, max_epoch=3, resume_ckpt_path=str(checkpoint)
    )
    assert rest.start.epoch == 1
    assert torch.equal(weights(whole), weights(rest))
    for mine, other in zip(whole.optimizer.state.values(), rest.optimizer.state.values(), strict=True):
        assert all(torch.equal(mine[key], other[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert sorted(path.name for path in rest.output_dir.iterdir()) == [
        "checkpoint_1.pth",
        "checkpoint_2.pth",
        "log.txt",
        "metrics.jsonl",
        "result",
    ]


def test_nothing_left_to_train_is_said_and_no_error(tmp_path, capsys):
    done = trained(tmp_path / "done")
    again = runner(settings(tmp_path / "again", resume_ckpt_path=str(done.last_checkpoint)))
    assert again.train() is None
    assert "has finished epoch 1 and run.max_epoch is 2; raise run.max_epoch" in capsys.readouterr().out
    assert not (tmp_path / "again").exists()


def test_resume_of_other_parameters_is_refused(tmp_path):
    done = trained(tmp_path / "done")
    model = tiny_model()
    model.visual_encoder.requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"run.resume_ckpt_path: the optimizer state is of other parameters"):
        trained(tmp_path / "other", model=model, resume_ckpt_path=str(done.last_checkpoint), max_epoch=5)
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


class Images(Dataset):
    """Five samples with a name, as datasets of the package are."""

    name, sample_ratio = "images", None

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "text_input": "a"}

    def bind(self, place, num_workers=0, max_bad_fraction=0.05):
        self.place = place


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
    assert losses["val_loss"] == pytest.approx(expected, rel=1e-5)  # float32 means of 2, 2 and 1 samples
    assert json.loads((run.output_dir / "log.txt").read_text().splitlines()[-1]) == losses
    assert f"Evaluation on val: loss {losses['val_loss']:.4f}" in caplog.text
    cfg.run_cfg.valid_splits = ["test"]
    with pytest.raises(ValueError, match=r"no dataset has a split 'test' \(there are: images: val\)"):
        run.train()


def test_validation_loss_is_in_the_log_of_every_epoch(tmp_path):
    images = batches(5, 1, seed=1)[0]["image"]
    cfg = settings(tmp_path, valid_splits=["val"], batch_size_eval=2)
    run = runner(cfg, datasets={"images": {"val": Images(images)}})
    run.train(endless(batches()))
    lines = [json.loads(line) for line in (run.output_dir / "log.txt").read_text().splitlines()[-2:]]
    assert [sorted(line) for line in lines] == [["train_loss", "train_lr", "val_loss"]] * 2
    assert lines[1]["val_loss"] < lines[0]["val_loss"]


# ---------------------------------------- from datasets


def with_datasets(cfg, **storages):
    """Return the task's real datasets of a configuration with these `build_info.storage`."""
    cfg.datasets_cfg = OmegaConf.create()
    for name, storage in storages.items():
        section = OmegaConf.structured(registry.get_builder_class(name).Config)
        section.build_info.storage = str(storage)
        section.vis_processor.train = {"name": "blip2_image_eval", "image_size": 8}
        cfg.datasets_cfg[name] = section
    return ImageTextPretrainTask().build_datasets(cfg)


def test_without_iters_per_epoch_an_epoch_is_a_pass_over_the_folder(tmp_path, capsys, caplog):
    write_align_folder(tmp_path / "align", 10)
    (tmp_path / "align" / "image" / "3.jpg").write_bytes(b"no image")
    cfg = settings(tmp_path / "out", iters_per_epoch=None, init_lr=1e-3, max_bad_fraction=0.5)
    run = runner(cfg, datasets=with_datasets(cfg, cc_sbu_align=tmp_path / "align"))
    with caplog.at_level(logging.INFO):
        run.train()
    assert run.iters_per_epoch == 3  # 10 samples in batches of 4, the last one goes on with the next pass
    assert "Loaded 10 records for train split from the dataset." in caplog.text
    assert re.search(
        r"^cc_sbu_align: (\d+) of \d+ samples skipped \(\1 bad_image\)$", capsys.readouterr().out, flags=re.M
    )
    steps = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    again = runner(cfg, datasets=run.datasets)
    again.train()
    assert torch.equal(weights(run), weights(again))  # same seed, same data
    changes = {"max_epoch": 3, "resume_ckpt_path": str(run.last_checkpoint), "resume_mode": "restart"}
    more = settings(tmp_path / "out", iters_per_epoch=3, **changes)
    rest = runner(more, datasets=run.datasets)
    rest.train()
    resumed = [json.loads(line) for line in (rest.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in resumed] == [6, 7, 8] and len(steps) == 6


def test_streams_need_iters_per_epoch(tmp_path, capsys, caplog):
    write_shard(tmp_path / "00000.tar", range(12))
    cfg = settings(tmp_path / "out", iters_per_epoch=None)
    storages = {"laion": tmp_path / "00000.tar", "cc_sbu": tmp_path / "00000.tar"}
    with pytest.raises(ValueError, match=r"^run.iters_per_epoch: missing, and shards have no end \(laion, cc_sbu\)"):
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
    assert out.startswith("llama_proj.weight\nllama_proj.bias\nnumber of trainable parameters: 14\n")
    assert re.search(r"^visual_encoder +42 +0  float32  cpu$", out, flags=re.M)
    progress = re.findall(
        rf"^Train: data epoch: \[0\]  \[ *(\d+)/12\]  eta: {TIME}  lr: (\d\.\d{{6}})  loss: (\d+\.\d{{4}})"
        r"  time: \d+\.\d{4}  data: \d+\.\d{4}$",
        out,
        flags=re.M,
    )
    assert [int(step) for step, _, _ in progress] == [0, 4, 8, 11]
    assert "  [ 0/12]  " in out and "  [11/12]  " in out
    assert progress[0][1] == "0.001000"
    assert re.search(rf"^Train: data epoch: \[0\] Total time: {TIME} \(\d+\.\d{{4}} s / it\)$", out, flags=re.M)
    assert re.search(rf"^Training time {TIME}$", out, flags=re.M)
    assert f"Next: use these weights by --options model.ckpt={run.output_dir}/checkpoint_0.pth" in out
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
    steps = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(12))
    assert [step["samples"] for step in steps] == list(range(4, 52, 4))
    assert set(steps[0]) == {"step", "epoch", "lr", "samples", "seconds", "data_seconds", "loss", "memory_mib"}
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
    assert all(re.fullmatch(r"\d{12}(-\d)?", folder.name) and folder.parent == Path("out") for folder in folders)
    named = runner(settings("out", max_epoch=1))
    named.job_id = "mine"
    named.train(endless(batches()))
    assert named.output_dir == Path("out/mine") and (named.output_dir / "result").is_dir()


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"run.output_dir: cannot make a folder in '.*/file/below'"):
        trained(tmp_path / "file" / "below")


def test_a_checkpoint_that_cannot_be_written_costs_a_warning_and_at_the_end_an_error(tmp_path, caplog):
    run = runner(settings(tmp_path))

    def lose_the_folder():
        for number, batch in enumerate(endless(batches())):
            if number == 2:
                run.output_dir.rename(tmp_path / "lost")
            yield batch

    with pytest.raises(OSError, match="the last epoch's checkpoint could not be written"):
        run.train(lose_the_folder())
    assert caplog.text.count("checkpoint not saved to") == 2
    assert caplog.text.count("training goes on without it") == 1


# ---------------------------------------- settings and start

PROBLEMS = [
    ({"init_lr": None}, "run.init_lr: missing; it has no default"),
    ({"max_epoch": None}, "run.max_epoch: missing; it has no default"),
    ({"accum_grad_iters": 0}, "run.accum_grad_iters: 0 is out of range; it must be at least 1"),
    ({"seed": -1}, "run.seed: -1 is out of range; it must be at least 0"),
    ({"max_bad_fraction": 5.0}, "run.max_bad_fraction: 5.0 is out of range; it must be between 0 and 1"),
    ({"accum_reduction": "max"}, "run.accum_reduction: 'max' is not one of mean, sum"),
    ({"warmup_clock": "wall"}, "run.warmup_clock: 'wall' is not one of epoch, global"),
    ({"amp_dtype": "fp16"}, "run.amp_dtype: 'fp16' is not one of auto, float16, bfloat16"),
    (
        {"amp": True, "amp_dtype": "float16"},
        "run.amp_dtype: float16 trains on CUDA only, the device is cpu; use auto",
    ),
    ({"device": "gpu"}, "run.device: 'gpu' is no device; give auto, cpu, cuda, cuda:<index> or mps"),
    ({"train_splits": ["val"]}, "run.train_splits: ['val'] has no 'train', the split that is trained on"),
    ({"lr_sched": "linear_warmup_step_lr"}, "run.lr_decay_rate: missing; linear_warmup_step_lr needs it"),
    ({"valid_splits": ["val"]}, "run.batch_size_eval: missing; the splits val need it"),
    (
        {"evaluate": True},
        "run.evaluate: True, but run.valid_splits and run.test_splits are empty; name one",
    ),
    (
        {"resume_ckpt_path": "nowhere.pth"},
        "run.resume_ckpt_path: no file at 'nowhere.pth' (found nothing); give the path of the file or its URL",
    ),
]


@pytest.mark.parametrize(
    ("changes", "line"), PROBLEMS, ids=lambda case: "-".join(case) if isinstance(case, dict) else ""
)
def test_problems_of_the_run_section(tmp_path, changes, line):
    problems = RunnerBase.preflight(settings(tmp_path, **changes).run_cfg, "run")
    assert line in map(str, problems)


def test_a_sound_run_section_has_no_problems(tmp_path):
    assert RunnerBase.preflight(settings(tmp_path).run_cfg, "run") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_cuda_without_a_gpu_says_what_to_do(tmp_path):
    expected = "run.device: 'cuda' but torch sees no GPU; use --options run.device=cpu"
    problems = RunnerBase.preflight(settings(tmp_path, device="cuda").run_cfg, "run")
    assert list(map(str, problems)) == [expected]
    with pytest.raises(ValueError, match=re.escape(expected)):
        runner(settings(tmp_path, device="cuda"))


def test_names_lead_to_classes_and_unknown_ones_to_a_list(tmp_path):
    cfg = settings(tmp_path)
    assert isinstance(setup_task(cfg), ImageTextPretrainTask)
    assert registry.get_runner_class("runner_base") is RunnerBase
    with pytest.raises(RegistryError, match="known: linear_warmup_cosine_lr, linear_warmup_step_lr"):
        trained(tmp_path, lr_sched="cosine")


def test_launchers(tmp_path):
    run_cfg = settings(tmp_path).run_cfg
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert launched_processes(run_cfg, {}) == (0, 1, None)
    assert launched_processes(run_cfg, torchrun) == (3, 4, 1)
    assert launched_processes(run_cfg, {"SLURM_PROCID": "0"}) == (0, 1, None)
    assert launched_processes(run_cfg, {"SLURM_PROCID": "2", "SLURM_NTASKS": "8"})[:2] == (2, 8)
    assert launch_problems(run_cfg, "run", torchrun) == []
    assert (
        "env:// needs MASTER_ADDR and MASTER_PORT"
        in launch_problems(run_cfg, "run", {"RANK": "0", "WORLD_SIZE": "2"})[0].message
    )
    run_cfg.distributed = False
    (problem,) = launch_problems(run_cfg, "run", torchrun)
    assert str(problem).startswith("run.distributed: False, but 4 processes were started")


def test_no_two_ranks_and_seeds_share_their_numbers():
    drawn = set()
    for seed, rank, epoch in [(42, 0, 0), (42, 1, 0), (43, 0, 0), (43, 1, 0), (42, 0, 1), (42, 1, 1)]:
        setup_seeds(seed, rank, epoch)
        drawn.add(torch.rand(1).item())
    assert len(drawn) == 6
    assert len({derived_seed(42, 1), derived_seed(43, 0), derived_seed(41, 2)}) == 3


# ---------------------------------------- two processes

TWO_RANKS = """
import json, os, sys
import torch
from omegaconf import OmegaConf
from minigpt4.common import dist_utils
from minigpt4.runners import RunnerBase
from tests.small_release import write_align_folder, write_shard
from tests.training import TinyModel, batches, endless, runner, settings

root, rank = sys.argv[1], int(os.environ["RANK"])
cfg = settings(f"{root}/of_rank_{rank}")
cfg.pretty_print = lambda: None
before = OmegaConf.to_container(cfg.run_cfg)
with RunnerBase.launched(cfg):
    found = {"drawn": torch.rand(1).item(), "proj": [], "frozen": [], "buffer": [], "output_dir": []}
    halves = [{"image": b["image"].chunk(2)[rank], "text_input": ["a"] * 2} for b in batches()]
    for frozen_value in (0.5 + rank, 0.5):
        torch.manual_seed(rank)  # other weights on every rank
        model = TinyModel(frozen_value=frozen_value)
        run = runner(cfg, model)
        run.train(endless(halves))
        found["proj"].append(model.llama_proj.weight.tolist())
        found["frozen"].append(model.visual_encoder.weight[0, 0].item())
        found["buffer"].append(model.visual_encoder.scale.item())
        found["output_dir"].append(str(run.output_dir))
    launch, after = dist_utils.launched_processes(cfg.run_cfg)._asdict(), OmegaConf.to_container(cfg.run_cfg)
    launch |= {"dist_backend": torch.distributed.get_backend(), "distributed": dist_utils.is_distributed()}
    found["run"] = launch
    found["is_config_untouched"] = after == before
    json.dump(found, open(f"{root}/found_{rank}.json", "w"))
print("left", dist_utils.is_distributed())
"""


def torchrun(script, *args, timeout=60):
    """Run a script on two ranks; its processes end with the test, also if they hang."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    process = subprocess.Popen(
        [*command, *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"two ranks did not end within {timeout} s:\n{output}")
    return process.returncode, output


def found_by_two_ranks(source, folder):
    """Return what each rank of the script `source` wrote to found_<rank>.json in `folder`, and what both said."""
    script = folder / "two_ranks.py"
    script.write_text(source)
    code, output = torchrun(script, folder)
    assert code == 0, output
    return *(json.loads((folder / f"found_{rank}.json").read_text()) for rank in range(2)), output


def test_two_ranks_train_as_one(tmp_path):
    first, second, output = found_by_two_ranks(TWO_RANKS, tmp_path)
    assert first["drawn"] == second["drawn"]  # what is initialised before training is the same everywhere
    assert first["proj"] == second["proj"]
    assert (first["frozen"], second["frozen"]) == ([0.5, 0.5], [1.5, 0.5])  # nothing frozen was sent,
    assert (first["buffer"], second["buffer"]) == ([0.5, 0.5], [1.5, 0.5])  # nor a buffer
    alone = trained(tmp_path / "alone").model.llama_proj.weight
    # the mean of two halves' gradients: float32 rounding over 12 steps
    assert (torch.tensor(first["proj"][1]) - alone).abs().max() < 1e-6
    launch = {"rank": 1, "world_size": 2, "local_rank": 1, "dist_backend": "gloo", "distributed": True}
    assert second["run"] == launch and second["is_config_untouched"]
    assert not (tmp_path / "of_rank_1").exists() and second["output_dir"] == first["output_dir"]
    folder = Path(first["output_dir"][0])
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["samples"] for step in steps] == list(range(4, 52, 4))  # a second writer would double the lines
    assert output.count("| distributed init (rank ") == 2
    assert output.count("number of trainable parameters") == output.count("Training time") == 2
    assert output.count("left False") == 2
    saved = torch.load(folder / "checkpoint_1.pth", weights_only=True)["model"]
    assert saved["llama_proj.weight"].tolist() == first["proj"][0]
