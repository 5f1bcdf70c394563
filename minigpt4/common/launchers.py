"""How this process was launched: by torchrun, SLURM's srun, an MPI, or alone; and checks of `run` against that."""

import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from minigpt4.common.config import Problem
from minigpt4.common.device import resolve_device


class Launch(NamedTuple):
    """The place of this process among all. `local_rank`: its index on this machine, None if it is alone."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None


TORCHRUN, SLURM = "torchrun", "SLURM's srun"
# launcher: its environment variables for rank, world size and local rank; the first that is found counts
_LAUNCHERS = {
    TORCHRUN: ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    # before SLURM: mpirun may start its daemons by srun, so that its processes have both sets of variables
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    # not SLURM_NTASKS, which a job script has, too: only srun's tasks have SLURM_STEP_NUM_TASKS
    SLURM: ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "mpirun_rsh": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}


def _launcher(environ: Mapping[str, str]) -> str | None:
    """Return which of _LAUNCHERS started this process; an empty variable counts as unset."""
    for name, variables in _LAUNCHERS.items():
        if all(environ.get(variable) for variable in variables[:2]):
            return name
    return None


def launched_processes(run_cfg: DictConfig, environ: Mapping[str, str] = os.environ) -> Launch:
    """Return how torchrun, SLURM's srun or an MPI started this process; a single process is alone.

    Under srun the local rank is the rank modulo the number of GPUs, and `run.world_size` above 1 replaces SLURM's. Raises
    ValueError that names a variable that is not a number, out of range, or missing.
    """
    launcher = _launcher(environ)
    if launcher is None:
        # one of torchrun's two variables alone is a mistake, but for WORLD_SIZE=1
        there, missing = sorted(_LAUNCHERS[TORCHRUN][:2], key=lambda name: not environ.get(name))
        if environ.get(there) and (there, environ[there]) != ("WORLD_SIZE", "1"):
            raise ValueError(
                f"{there} is set in the environment, {missing} is not; torchrun sets both. {_UNSET}"
            )
        return Launch()
    launch = Launch(*(_number(environ, variable) for variable in _LAUNCHERS[launcher]))
    if launcher == SLURM:
        launch = launch._replace(local_rank=launch.rank % max(torch.cuda.device_count(), 1))
        if run_cfg.world_size > 1:
            launch = launch._replace(world_size=run_cfg.world_size)
    if not launch.rank < launch.world_size:
        found = f"rank {launch.rank} of {launch.world_size} processes by {_named(launcher)}; ranks begin with 0"
        raise ValueError(f"{found}. {_UNSET}")
    # a single process of torchrun still joins a process group
    is_alone = launch.world_size == 1 and not (launcher == TORCHRUN and environ.get("MASTER_ADDR"))
    return Launch() if is_alone else launch


def _named(launcher: str) -> str:
    """Return a launcher's name with the variables by which it was recognised, for messages."""
    return f"{launcher} ({', '.join(_LAUNCHERS[launcher][:2])})"


_UNSET = "To start one process alone, unset these variables"


def _number(environ: Mapping[str, str], variable: str) -> int:
    text = environ.get(variable) or "0"
    if not text.isdecimal():
        raise ValueError(f"{variable}: {text!r} in the environment is no number. {_UNSET}")
    return int(text)


def run_device(run_cfg: DictConfig) -> torch.device:
    """Return this process's device by `run.device`. Raises DeviceError if it is not available."""
    return resolve_device(run_cfg.device, launched_processes(run_cfg).local_rank)


def launch_problems(
    run_cfg: DictConfig, where: str, environ: Mapping[str, str] = os.environ
) -> list[Problem]:
    """Return the contradictions between the `run` section and the way this process was launched."""
    try:
        launch = launched_processes(run_cfg, environ)
    except ValueError as error:
        return [Problem(f"{where}.distributed", str(error))]
    if launch.local_rank is None:
        return []
    problems = []
    count, by = launch.world_size, f"started by {_named(_launcher(environ))}"
    if launch.world_size > 1 and not run_cfg.distributed:
        advice = f"start one (python train.py ...) or use --options {where}.distributed=True"
        message = f"False, but {count} processes were {by}; {advice}"
        problems.append(Problem(f"{where}.distributed", message))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if run_cfg.dist_url == "env://" and missing:
        message = f"env:// needs {' and '.join(missing)} in the environment, for the {count} processes {by}; "
        message += f"set them, or give tcp://<host>:<port>. {_UNSET}"
        problems.append(Problem(f"{where}.dist_url", message))
    return problems
