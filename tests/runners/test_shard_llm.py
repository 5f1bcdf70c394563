"""`run.shard_llm` through train.py: two ranks train the quickstart's default with a toy LLM, sharded over both."""

import json
import multiprocessing
import os
import signal
import socket
import sys
from functools import partial

import pytest
import torch

from minigpt4 import train
from minigpt4.common.config import ConfigError
from minigpt4.models import MiniGPT4
from minigpt4.tasks import BaseTask
from tests.quickstart.conftest import cache  # noqa: F401 (a fixture)
from tests.training import ROOT

SHORT = {
    "run.device": "cpu",
    "run.iters_per_epoch": 4,
    "run.batch_size_train": 3,
    "run.batch_size_eval": 2,
    "run.save_every_iters": 2,
    "run.log_freq": 1,
    "run.max_tokens_per_batch": 1,  # see `be_rank`
    "run.valid_splits": "[val]",
    "run.read_ahead": False,
}


def command_line(root, output, **settings):
    shard = root / "embedded/validation-v3/laion/00000.tar"
    settings = {**SHORT, "datasets.laion.val.storage": shard, "run.output_dir": output, **settings}
    options = [f"{key}={value}" for key, value in {"env.cache_root": root, **settings}.items()]
    return [
        "--cfg-path",
        str(ROOT / "train_configs/embedded_stage1_pretrain.yaml"),
        "--options",
        *options,
    ]


def be_rank(rank, port, said, arguments, killed_at):
    """Run train.py as a process of torchrun, killed at the beginning of step `killed_at`.

    Rank 1 splits a batch into single samples, rank 0 does not split it; each prints its number of passes at the end.
    """
    sys.stdout = sys.stderr = open(f"{said}_{rank}.txt", "w", buffering=1)  # noqa: SIM115
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", **address}
    usual, split, passes = BaseTask.loss_and_targets, MiniGPT4.split, []

    def loss_and_targets(self, model, samples):
        passes.append(samples["iters"])
        if samples["iters"] == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(self, model, samples)

    BaseTask.loss_and_targets = loss_and_targets
    MiniGPT4.split = lambda self, samples, limit: split(self, samples, limit if rank else 1000)
    code = train.train(train.parse_args(arguments))
    print("passes", passes)
    sys.exit(code)


def two_ranks(said, arguments, killed_at=None):
    """Return (exit codes, outputs) of two ranks."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    fork = partial(multiprocessing.get_context("fork").Process, target=be_rank, daemon=True)
    ranks = [fork(args=(rank, port, said, arguments, killed_at)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(900)
    texts = [said.with_name(f"{said.name}_{rank}.txt").read_text() for rank in range(2)]
    return [process.exitcode for process in ranks], texts


def result(output):
    """Return (weights, losses of the steps, held-out losses) of the one run below `output`."""
    (folder,) = output.iterdir()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    weights = torch.load(folder / "checkpoint_0.pth", weights_only=True)["model"]
    losses = {line["step"]: line["loss"] for line in lines if "validation" not in line}
    held_out = [(line["loss"], line["samples"]) for line in lines if "validation" in line]
    return weights, losses, held_out


def test_a_killed_run_of_shares_ends_as_one_of_whole_llms(cache, tmp_path):  # noqa: F811
    codes, said = two_ranks(tmp_path / "whole", command_line(cache, tmp_path / "whole"))
    assert codes == [0, 0], said
    assert (
        "passes [0, 1, 2, 3]" in said[0]
        and "passes [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]" in said[1]
    )
    shared = {
        "run.output_dir": tmp_path / "shared",
        "run.shard_llm": True,
        "run.resume_ckpt_path": "auto",
    }
    codes, said = two_ranks(
        tmp_path / "killed", command_line(cache, tmp_path / "shared", **shared), killed_at=3
    )
    assert codes == [-signal.SIGKILL, -signal.SIGKILL], said
    codes, said = two_ranks(
        tmp_path / "resumed", command_line(cache, tmp_path / "shared", **shared)
    )
    assert codes == [0, 0], said
    # rank 0 makes two of three passes only for its shares of the LLM
    assert all("passes [2, 2, 2, 3, 3, 3]" in text for text in said)
    assert "samples.html: not written" in said[0] and "frozen weights are not" not in said[0]
    (expected, losses, held_out) = result(tmp_path / "whole")
    (found, my_losses, mine) = result(tmp_path / "shared")
    assert found.keys() == expected.keys() == {"llama_proj.weight", "llama_proj.bias"}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert my_losses == losses and list(losses) == list(range(4)) and mine == held_out != []
    (card,) = (tmp_path / "shared").glob("*/run_card.json")
    parts = json.loads(card.read_text())["model"]["frozen_sha256"]
    assert parts["llama_model (1 of 2 shares)"]["unchanged"]


@pytest.fixture
def planned(cache, tmp_path, capsys):  # noqa: F811
    """Return a function that returns what `--dry-run` prints."""

    def planned(*more, **settings):
        arguments = command_line(cache, tmp_path, **settings)
        assert train.train(train.parse_args([*arguments, "--dry-run", *more])) == 0
        return capsys.readouterr().out

    return planned


def test_a_plan_for_a_gpu_that_is_not_here_may_use_float16(planned):
    plan = planned("--gpu-memory", "24", **{"run.amp": True, "run.amp_dtype": "float16"})
    assert "cuda:0 has 24.0 GiB" in plan


def test_the_plan_divides_the_llm(planned, cache, tmp_path):  # noqa: F811
    alone = planned(**{"run.shard_llm": True})
    shared = planned("--gpus", "8", **{"run.shard_llm": True})
    assert (
        "a single process has no other to divide the LLM with" in alone and "divided" not in alone
    )
    assert (
        "8 process(es)" in shared
        and "of weights, the LLM divided among 8 processes, at most" in shared
    )
    with pytest.raises(ValueError, match=r"--gpus 2: .*--dry-run"):
        train.train(train.parse_args([*command_line(cache, tmp_path), "--gpus", "2"]))


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"run.shard_llm": True, "model.lora_r": 4},
            "run.shard_llm: only a frozen LLM .* model.lora_r is 4",
        ),
        (
            {"run.shard_llm": True, "model.llm_quantization": "nf4"},
            "run.shard_llm: .*nf4 cannot .*none, int8",
        ),
        (
            {"run.shard_llm": True, "model.cuda_graphs": True},
            "run.shard_llm: steps of a divided LLM are not recorded",
        ),
        (
            {"model.device_map": "auto"},
            "model.device_map: spreads the LLM of a chat .*run.shard_llm=True",
        ),
        (
            {"model.device_map": "auto", "model.llm_quantization": "int8"},
            "model.device_map: the LLM in int8 lies on",
        ),
        (
            {"model.device_map": "cuda:1"},
            "model.device_map: 'cuda:1' is not one of none, auto, balanced",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(settings, message, cache, tmp_path):  # noqa: F811
    arguments = command_line(cache, tmp_path, **settings)
    with pytest.raises(ConfigError, match=message):
        train.train(train.parse_args([*arguments, "--dry-run"]))
