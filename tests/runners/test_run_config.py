"""The settings of a run and the launch of its process: their problems and their effects."""

import os
import re

import pytest
import torch

from minigpt4.common.dist_utils import derived_seed, setup_seeds
from minigpt4.common.launchers import launch_problems, launched_processes
from minigpt4.common.registry import RegistryError, registry
from minigpt4.runners import RunnerBase
from minigpt4.tasks import ImageTextPretrainTask, setup_task
from tests.training import runner, settings, trained

PROBLEMS = [
    ({"init_lr": None}, "run.init_lr: missing; it has no default"),
    ({"max_epoch": None}, "run.max_epoch: missing; it has no default"),
    ({"accum_grad_iters": 0}, "run.accum_grad_iters: 0 is out of range; it must be at least 1"),
    ({"seed": -1}, "run.seed: -1 is out of range; it must be at least 0"),
    (
        {"max_bad_fraction": 5.0},
        "run.max_bad_fraction: 5.0 is out of range; it must be between 0 and 1",
    ),
    ({"beta2": 1.0}, "run.beta2: 1.0 is out of range; it must be at least 0 and below 1"),
    ({"beta2": -0.1}, "run.beta2: -0.1 is out of range; it must be at least 0 and below 1"),
    (
        {"max_grad_norm": 0.0},
        "run.max_grad_norm: 0.0 is out of range; it must be above 0; null: no clipping",
    ),
    ({"lr_decay_rate": 0.0}, "run.lr_decay_rate: 0.0 is out of range; it must be above 0"),
    ({"accum_reduction": "max"}, "run.accum_reduction: 'max' is not one of tokens, mean, sum"),
    ({"warmup_clock": "wall"}, "run.warmup_clock: 'wall' is not one of epoch, global"),
    ({"amp_dtype": "fp16"}, "run.amp_dtype: 'fp16' is not one of auto, float16, bfloat16"),
    (
        {"amp": True, "amp_dtype": "float16"},
        "run.device: cpu, but run.amp_dtype=float16 trains on CUDA only; set that to auto",
    ),
    (
        {"device": "gpu"},
        "run.device: 'gpu' is no device; give auto, cpu, cuda, cuda:<index> or mps",
    ),
    (
        {"train_splits": ["val"]},
        "run.train_splits: ['val'] has no 'train', the split that is trained on",
    ),
    (
        {"lr_sched": "linear_warmup_step_lr"},
        "run.lr_decay_rate: missing; linear_warmup_step_lr needs it",
    ),
    ({"valid_splits": ["val"]}, "run.batch_size_eval: missing; the splits val need it"),
    ({"eval_every_iters": 0}, "run.eval_every_iters: 0 is out of range; it must be at least 1"),
    ({"eval_every_iters": 5}, "run.eval_every_iters: run.valid_splits is empty; name one"),
    ({"eval_samples": -1}, "run.eval_samples: -1 is out of range; it must be at least 0"),
    (
        {"valid_splits": ["val"], "best_metric": "bleu"},
        "run.best_metric: 'bleu' is not measured; known: val_loss, val_wrong_gap",
    ),
    (
        {"valid_splits": ["val"], "best_metric": "val_wrong_gap", "eval_controls": False},
        "run.best_metric: 'val_wrong_gap' is not measured; known: val_loss",
    ),
    (
        {"best_metric": "val_loss"},
        "run.best_metric: 'val_loss' is not measured; run.valid_splits is empty; name one",
    ),
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
    with pytest.raises(
        RegistryError, match="known: linear_warmup_cosine_lr, linear_warmup_step_lr"
    ):
        trained(tmp_path, lr_sched="cosine")


def test_launchers(tmp_path):
    run_cfg = settings(tmp_path).run_cfg
    torchrun = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }
    assert launched_processes(run_cfg, {}) == (0, 1, None)
    assert launched_processes(run_cfg, torchrun) == (3, 4, 1)
    assert launched_processes(run_cfg, {"SLURM_PROCID": "0"}) == (0, 1, None)
    assert launch_problems(run_cfg, "run", torchrun) == []
    assert (
        "env:// needs MASTER_ADDR and MASTER_PORT"
        in launch_problems(run_cfg, "run", {"RANK": "0", "WORLD_SIZE": "2"})[0].message
    )
    run_cfg.distributed = False
    (problem,) = launch_problems(run_cfg, "run", torchrun)
    assert str(problem).startswith("run.distributed: False, but 4 processes were started")


JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "4",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}
PLACE = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
KEYS = ("RANK", "SIZE", "LOCAL_RANK")
STARTED = {
    "nothing": ({}, (0, 1, None)),
    "a job's script, of four tasks": (JOB, (0, 1, None)),
    "srun in it": (JOB | {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}, (2, 4, 0)),
    "srun of one task": (JOB | {"SLURM_STEP_NUM_TASKS": "1"}, (0, 1, None)),
    "torchrun in it": (JOB | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, (1, 2, 1)),
    "torchrun, one process": (
        PLACE | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        (0, 1, 0),
    ),
    "one process, exported by hand": ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, None)),
    "empty": ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": "", "SLURM_PROCID": ""}, (0, 1, None)),
    "empty in a job": (JOB | {"RANK": "", "WORLD_SIZE": ""}, (0, 1, None)),
    "an empty local rank": (PLACE | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": ""}, (1, 2, 0)),
    "one process of one": ({"WORLD_SIZE": "1"}, (0, 1, None)),
    "mpirun": (
        {
            "OMPI_COMM_WORLD_RANK": "1",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        },
        (1, 2, 1),
    ),
    "mpirun_rsh": (
        {f"MV2_COMM_WORLD_{key}": "1" if key != "SIZE" else "2" for key in KEYS},
        (1, 2, 1),
    ),
    "mpirun over the machines of a job": (
        JOB
        | {"SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8"},
        (5, 8, 0),
    ),
    "mpiexec, one process": ({"PMI_RANK": "0", "PMI_SIZE": "1"}, (0, 1, None)),
}


@pytest.mark.parametrize("environ, expected", STARTED.values(), ids=STARTED)
def test_who_started_this_process(environ, expected, tmp_path):
    assert launched_processes(settings(tmp_path).run_cfg, environ) == expected


ASKS = "run.dist_url: env:// needs MASTER_ADDR and MASTER_PORT in the environment, for the 2 processes started by "
UNSET = "To start one process alone, unset these variables"
REFUSED = {
    "srun": (
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"},
        "SLURM's srun (SLURM_PROCID, SLURM_STEP_NUM_TASKS);",
    ),
    "mpirun": (
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
        "mpirun (OMPI_COMM_WORLD_RANK, OMPI_",
    ),
    "empty place": (
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "", "MASTER_PORT": ""},
        "torchrun (RANK, WORLD_",
    ),
    "no number": (
        {"RANK": "x", "WORLD_SIZE": "2"},
        f"run.distributed: RANK: 'x' in the environment is no number. {UNSET}",
    ),
    "negative": (
        {"RANK": "0", "WORLD_SIZE": "-2"},
        "run.distributed: WORLD_SIZE: '-2' in the environment is no number.",
    ),
    "too large": (
        PLACE | {"RANK": "2", "WORLD_SIZE": "2"},
        f"run.distributed: rank 2 of 2 processes by torchrun (RANK, WORLD_SIZE); ranks begin with 0. {UNSET}",
    ),
    "half": (
        {"WORLD_SIZE": "8"},
        f"run.distributed: WORLD_SIZE is set in the environment, RANK is not; torchrun sets both. {UNSET}",
    ),
    "the other half": (
        {"RANK": "0"},
        "run.distributed: RANK is set in the environment, WORLD_SIZE is not",
    ),
    "none": (
        {"RANK": "0", "WORLD_SIZE": "0"},
        "run.distributed: rank 0 of 0 processes by torchrun",
    ),
}


@pytest.mark.parametrize("environ, message", REFUSED.values(), ids=REFUSED)
def test_a_start_that_cannot_work_names_the_variables(environ, message, tmp_path, monkeypatch):
    (problem,) = launch_problems(settings(tmp_path).run_cfg, "run", environ)
    assert str(problem).startswith(message if message.startswith("run.") else ASKS + message)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert list(map(str, RunnerBase.preflight(settings(tmp_path).run_cfg, "run"))) == [str(problem)]


@pytest.mark.parametrize(
    "path, found",
    [
        ("file", "'{tmp}/file' is no folder; give one, which is made if it is not there"),
        ("file/below", "'{tmp}/file' is no folder; give one, which is made if it is not there"),
        (
            "broken link",
            "'{tmp}/broken link' is no folder; give one, which is made if it is not there",
        ),
        ("x" * 300, "is no name of a folder ([Errno 36] File name too long: "),
        ("a\0b", "is no name of a folder ("),
    ],
)
def test_an_output_folder_that_cannot_be_made_is_found_before(path, found, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "broken link").symlink_to(tmp_path / "absent")
    (problem,) = RunnerBase.preflight(settings(tmp_path / path).run_cfg, "run")
    assert problem.key == "run.output_dir" and found.format(tmp=tmp_path) in problem.message
    assert RunnerBase.preflight(settings(tmp_path / "new/folder").run_cfg, "run") == []


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_an_output_folder_that_may_not_be_written_is_found_before(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    (problem,) = RunnerBase.preflight(settings(tmp_path / "locked/out").run_cfg, "run")
    assert problem.message.startswith(f"'{tmp_path}/locked' is not writable for user ")


def test_no_two_ranks_and_seeds_share_their_numbers():
    drawn = set()
    for seed, rank, epoch in [
        (42, 0, 0),
        (42, 1, 0),
        (43, 0, 0),
        (43, 1, 0),
        (42, 0, 1),
        (42, 1, 1),
    ]:
        setup_seeds(seed, rank, epoch)
        drawn.add(torch.rand(1).item())
    assert len(drawn) == 6
    assert len({derived_seed(42, 1), derived_seed(43, 0), derived_seed(41, 2)}) == 3
