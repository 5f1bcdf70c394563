"""Checkpoints are complete or absent, have the five keys of 2023, and run no code when they are read."""

import multiprocessing
import os
import random
import re
import resource
import time

import pytest
import torch

from minigpt4.common.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_optimizer,
    save_checkpoint,
)
from tests.training import batches, endless, runner, settings

WHERE = "run.resume_ckpt_path"


def state(value=1.0, size=1000):
    return {
        "model": {"w": torch.full((size,), value)},
        "optimizer": {},
        "config": {"run": {}},
        "scaler": None,
        "epoch": 3,
    }


def test_five_keys_in_plain_form(tmp_path):
    run = runner(settings(tmp_path))
    run.train(endless(batches()))
    saved, path = load_checkpoint(str(run.last_checkpoint), WHERE)
    assert list(saved) == ["model", "optimizer", "config", "scaler", "epoch"]
    whole = load_checkpoint(str(run.last_checkpoint), WHERE, whole=True)[0]
    assert list(whole) == [*saved, "progress"] and whole["progress"]["position"] == {
        "epoch": 2,
        "step": 0,
    }
    assert path.name == "checkpoint_1.pth" and saved["epoch"] == 1 and saved["scaler"] is None
    assert list(saved["model"]) == ["llama_proj.weight", "llama_proj.bias"]
    assert saved["config"] == run.config.to_dict()
    groups = saved["optimizer"]["param_groups"]
    assert [(group["params"], group["weight_decay"]) for group in groups] == [
        ([0], 0.05),
        ([1], 0.0),
    ]
    assert set(saved["optimizer"]["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}


class Interrupts:
    """An object whose pickling is interrupted."""

    def __reduce__(self):
        raise KeyboardInterrupt


def test_an_interrupted_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint_0.pth"
    assert save_checkpoint(path, state())
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {**state(2.0), "config": Interrupts()})
    assert load_checkpoint(path, WHERE)[0]["model"]["w"][0] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint_0.pth"]


def test_a_full_disk_costs_a_warning_and_leaves_the_old_file(tmp_path, caplog):
    path = tmp_path / "checkpoint_0.pth"
    assert save_checkpoint(path, state())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as on a disk with 100 kB left
    try:
        assert not save_checkpoint(path, state(2.0, size=1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"checkpoint not saved to {path}" in caplog.text and "training goes on" in caplog.text
    assert load_checkpoint(path, WHERE)[0]["model"]["w"][0] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint_0.pth"]


def test_a_lost_folder_costs_a_warning(tmp_path, caplog):
    assert not save_checkpoint(tmp_path / "gone" / "checkpoint_0.pth", state())
    assert "No such file or directory" in caplog.text


def save_for_ever(path):
    value = 1.0
    while True:
        save_checkpoint(path, state(value, size=200_000))
        value += 1


def test_killed_at_any_time_the_file_is_whole(tmp_path):
    path = tmp_path / "checkpoint_0.pth"
    save_checkpoint(path, state(0.0, size=200_000))
    wait, seen = random.Random(5), set()
    for _ in range(8):
        process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(path,))
        process.start()
        time.sleep(wait.uniform(0.03, 0.2))
        process.kill()
        process.join()
        weights = load_checkpoint(path, WHERE)[0]["model"]["w"]
        assert (weights == weights[0]).all()
        seen.add(weights[0].item())
    assert seen != {0.0}


class RunsCode:
    """The content of a hostile file: unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    path, target = tmp_path / "hostile.pth", tmp_path / "made_by_code"
    torch.save({**state(), "config": RunsCode(target)}, path)
    message = rf"{WHERE}: '{path}' holds more than tensors and plain values (posix.mkdir), and was not opened"
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        load_checkpoint(path, WHERE)
    assert not target.exists() and "\n" not in str(caught.value)


def truncated(path):
    torch.save(state(), path)
    path.write_bytes(path.read_bytes()[:-2000])


BAD_FILES = {
    "truncated": (truncated, "is damaged or no file of torch"),
    "empty": (lambda path: path.write_bytes(b""), "is empty: the download went wrong"),
    "html": (
        lambda path: path.write_text("<!DOCTYPE html><html>404"),
        "is an HTML page, not weights",
    ),
    "weights": (
        lambda path: torch.save({"llama_proj.weight": torch.ones(2)}, path),
        r"has no model, optimizer, .*epoch",
    ),
    "tensor": (
        lambda path: torch.save(torch.ones(2), path),
        r"\(found: Tensor\).*set model.ckpt instead",
    ),
    "released": (
        lambda path: torch.save({"model": {}}, path),
        r"has no optimizer, .*\(found: model\)",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_named(tmp_path, kind):
    write, message = BAD_FILES[kind]
    path = tmp_path / f"{kind}.pth"
    write(path)
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(path, WHERE)
    assert str(caught.value).startswith(f"{WHERE}: '{path}'")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{WHERE}: no file at"):
        load_checkpoint(tmp_path / "none.pth", WHERE)


def test_an_optimizer_state_of_2023_is_taken(tmp_path):
    """Its groups lack newer options, `step` is a tensor, and the moments are on the CPU."""
    run = runner(settings(tmp_path))
    shapes = [parameter.shape for parameter in run.trainable]
    options = {
        "lr": 0.5,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "amsgrad": False,
        "foreach": None,
        "maximize": False,
    }
    groups = [
        {**options, "weight_decay": decay, "params": [index]}
        for index, decay in enumerate((0.05, 0))
    ]
    moments = {
        index: {
            "step": torch.tensor(7.0),
            "exp_avg": torch.full(shape, 0.5),
            "exp_avg_sq": torch.ones(shape),
        }
        for index, shape in enumerate(shapes)
    }
    load_optimizer(run.optimizer, {"state": moments, "param_groups": groups}, WHERE)
    for parameter in run.trainable:
        assert run.optimizer.state[parameter]["step"] == 7
        assert torch.equal(
            run.optimizer.state[parameter]["exp_avg"], torch.full(parameter.shape, 0.5)
        )
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.05, 0.05]
    moments[0]["exp_avg"] = torch.ones(3, 3)
    with pytest.raises(
        CheckpointError, match=r"optimizer state is of other parameters: groups of \[1, 1\]"
    ):
        load_optimizer(run.optimizer, {"state": moments, "param_groups": groups}, WHERE)
