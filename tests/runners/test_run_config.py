"""Settings of a run and how its process was started: what is wrong with them, and what they lead to."""

import re

import pytest
import torch

from minigpt4.common.dist_utils import derived_seed, launch_problems, launched_processes, setup_seeds
from minigpt4.common.registry import RegistryError, registry
from minigpt4.runners import RunnerBase
from minigpt4.tasks import ImageTextPretrainTask, setup_task
from tests.training import runner, settings, trained

PROBLEMS = [
    ({"init_lr": None}, "run.init_lr: missing; it has no default"),
    ({"max_epoch": None}, "run.max_epoch: missing; it has no default"),
    ({"accum_grad_iters": 0}, "run.accum_grad_iters: 0 is out of range; it must be at least 1"),
    ({"seed": -1}, "run.seed: -1 is out of range; it must be at least 0"),
    ({"max_bad_fraction": 5.0}, "run.max_bad_fraction: 5.0 is out of range; it must be between 0 and 1"),
    ({"accum_reduction": "max"}, "run.accum_reduction: 'max' is not one of tokens, mean, sum"),
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
