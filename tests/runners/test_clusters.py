"""Several machines: the Slurm script in Slurm's environment, and two torchrun agents of which one is replaced."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from tests.runners.test_preemption import command, finish, said, steps, wait_for, weights  # noqa: F401 (a fixture)
from tests.survival.processes import ROOT, kill_all, start

SCRIPT = ROOT / "train_configs/slurm.sbatch"
# fakes of Slurm's tools that record their arguments
TOOLS = {
    "scontrol": 'echo "scontrol $*" >> "$TOLD"; if [ "$1" = show ]; then echo node7; echo node8; fi',
    "srun": 'printf "%s\\n" "$@" > "$TOLD.srun"; trap "exit 143" USR1; [ -z "$LASTS" ] || { sleep 60 & wait; }',
}


@pytest.fixture
def sbatch(tmp_path):
    """Return a function that starts the script as Slurm does, with given arguments and further variables."""
    for name, text in TOOLS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "told").touch()
    slurm = {
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }
    environment = (
        os.environ
        | slurm
        | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TOLD": str(tmp_path / "told")}
    )

    def sbatch(*arguments, **more):
        return subprocess.Popen(
            ["bash", SCRIPT, *arguments], env=environment | more, stderr=subprocess.PIPE, text=True
        )

    return sbatch


@pytest.mark.parametrize("gpus, processes", [({"SLURM_GPUS_ON_NODE": "8"}, "8"), ({}, "1")])
def test_the_script_hands_slurms_variables_to_torchrun(sbatch, tmp_path, gpus, processes):
    assert sbatch("--cfg-path", "my.yaml", LASTS="", **gpus).wait(30) == 0
    words = (tmp_path / "told.srun").read_text().split()
    assert words[:2] == ["--kill-on-bad-exit=0", "torchrun"]
    args = get_args_parser().parse_args(words[2:])
    assert (args.nnodes, args.nproc_per_node, args.max_restarts) == ("2", processes, 3)
    assert (args.rdzv_backend, args.rdzv_id) == ("c10d", "123456")
    assert (
        args.rdzv_endpoint == f"node7:{20000 + 123456 % 20000}"
        and "SIGUSR1" in args.signals_to_handle
    )
    script = [args.training_script, *args.training_script_args]
    assert script == ["train.py", "--resume", "auto", "--cfg-path", "my.yaml"]
    # the job is not requeued
    assert (tmp_path / "told").read_text() == "scontrol show hostnames node[7-8]\n"


def test_the_script_passes_the_signal_on_and_queues_the_job_again(sbatch, tmp_path):
    process = sbatch(LASTS="yes")
    while not (tmp_path / "told.srun").exists() or not (tmp_path / "told.srun").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)  # until both have set their traps
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 143
    assert (tmp_path / "told").read_text().splitlines()[1:] == ["scontrol requeue 123456"]


def test_without_slurm_the_script_says_what_to_do(sbatch):
    process = sbatch(SLURM_JOB_NUM_NODES="")
    assert process.wait(30) != 0 and "start this script by sbatch" in process.stderr.read()


@pytest.mark.survival
def test_a_machine_is_lost_and_replaced(command, tmp_path, monkeypatch):  # noqa: F811
    """Each agent stands for a machine; the second dies with its rank, and is started again as by a scheduler."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    finish(command("whole"), tmp_path, "whole")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--max-restarts=3",
    ]
    launcher += [
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-id=job",
        "--local-addr=127.0.0.1",
    ]
    agents = []

    def agent(is_host):
        arguments = [f"--rdzv-conf=is_host={int(is_host)}", "train.py", *command.arguments("job")]
        agents.append(start([*launcher, *arguments], tmp_path / "job.txt"))
        return agents[-1]

    try:
        first, second = agent(True), agent(False)
        wait_for(first, tmp_path, "job", 13)
        kill_all(second)
        third = agent(False)
        finish(first, tmp_path, "job")
        third.wait(timeout=240)  # it may fail, since the store ended with the first agent
    finally:
        for each in agents:
            kill_all(each)
    assert "Resume checkpoint from" in said(tmp_path, "job")
    assert len(list(Path(tmp_path / "job").glob("*/checkpoint_0.pth"))) == 1
    assert steps(tmp_path, "job") == steps(tmp_path, "whole")
    assert torch.equal(weights(tmp_path, "job"), weights(tmp_path, "whole"))
