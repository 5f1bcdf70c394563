"""Several processes as one run: who am I, what do all know, one mean of all gradients. Works alone, too.

Gradients are averaged by a plain all-reduce once per optimizer step, not by DistributedDataParallel: the projection's
gradient is the last result of a backward pass, so there is nothing to overlap, and neither the frozen gigabytes nor
any buffer are ever looked at or sent.
"""

import os
import random
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from minigpt4.common.device import resolve_device


def is_distributed():
    return dist.is_available() and dist.is_initialized()


def get_rank():
    return dist.get_rank() if is_distributed() else 0


def get_world_size():
    return dist.get_world_size() if is_distributed() else 1


def is_main_process():
    return get_rank() == 0


def main_print(*args):
    """Print to stdout, from rank 0 only."""
    if is_main_process():
        print(*args, flush=True)


def launched_processes(run_cfg, environ=os.environ):
    """Return (rank, world size, local rank or None) as torchrun, or SLURM's srun, started this process.

    Under srun the local rank is the rank modulo the number of GPUs, and a `run.world_size` above 1 takes precedence
    over the number of SLURM tasks.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_RANK", 0))
    if "SLURM_PROCID" in environ:
        world_size = run_cfg.world_size if run_cfg.world_size > 1 else int(environ.get("SLURM_NTASKS", 1))
        rank = int(environ["SLURM_PROCID"])
        if world_size > 1:
            return rank, world_size, rank % max(torch.cuda.device_count(), 1)
    return 0, 1, None


def launch_problems(run_cfg, where, environ=os.environ):
    """Return what is wrong between the `run` section and the way this process was started, as lines."""
    _, world_size, local_rank = launched_processes(run_cfg, environ)
    problems = []
    if world_size > 1 and not run_cfg.distributed:
        problems.append(
            f"{where}.distributed: False, but {world_size} processes were started; start one (python train.py ...) or "
            f"use --options {where}.distributed=True"
        )
    if local_rank is not None and run_cfg.dist_url == "env://":
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]
        if missing:
            problems.append(
                f"{where}.dist_url: env:// needs {' and '.join(missing)} in the environment; set them, or give "
                "tcp://<host>:<port>"
            )
    return problems


def init_distributed_mode(run_cfg):
    """Join the process group if this process is one of several, and write what was found into the `run` section.

    Sets `rank`, `world_size`, `gpu` (local rank), `dist_backend` (nccl on CUDA, else gloo) and `distributed`. A rank
    that waits for another longer than `dist_timeout_s` ends with an error.
    Raises ValueError if the device is not there, or the start and the `run` section do not fit each other; OSError if
    the other ranks do not come.
    """
    if problems := launch_problems(run_cfg, "run"):
        raise ValueError("\n".join(problems))
    rank, world_size, local_rank = launched_processes(run_cfg)
    run_cfg.rank, run_cfg.world_size, run_cfg.gpu = rank, world_size, local_rank
    run_cfg.distributed = local_rank is not None and run_cfg.distributed
    device = resolve_device(run_cfg.device, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not run_cfg.distributed:
        print("Not using distributed mode", flush=True)
        return
    run_cfg.dist_backend = "nccl" if device.type == "cuda" else "gloo"
    print(f"| distributed init (rank {rank}, world {world_size}): {run_cfg.dist_url}", flush=True)
    timeout = timedelta(seconds=run_cfg.dist_timeout_s)
    try:
        store, _, _ = next(dist.rendezvous(run_cfg.dist_url, rank, world_size, timeout=timeout))
        # torchrun keeps its store over restarts: without a prefix, a restarted rank looks for the addresses of the dead
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            run_cfg.dist_backend,
            store=dist.PrefixStore(f"attempt {attempt}", store),
            world_size=world_size,
            rank=rank,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"run.dist_url: rank {rank} could not join the other {world_size - 1} ({reason})") from error


def leave_process_group(after_error=False):
    """Leave the process group, if any; without it a process can abort on its way out.

    After an error NCCL's is left standing: its goodbye would wait for the other ranks, and these wait for us.
    """
    if is_distributed() and not (after_error and dist.get_backend() == "nccl"):
        dist.destroy_process_group()


def barrier():
    """Wait until all ranks are here."""
    if is_distributed():
        dist.barrier()


def derived_seed(*numbers):
    """Return a seed that depends on all of `numbers` (0 or more each), and is not that of their sum."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def setup_seeds(seed, rank=0, epoch=0):
    """Seed Python's, NumPy's and torch's generators from (seed, rank, epoch), so that no two ranks or runs share one.

    Seeded at every epoch, what a run draws in an epoch does not depend on where it was resumed.
    """
    streams = np.random.SeedSequence([seed, rank, epoch]).generate_state(3)
    random.seed(int(streams[0]))
    np.random.seed(int(streams[1]))
    torch.manual_seed(int(streams[2]))


def from_main(make):
    """Return on every rank what ``make()`` returns on rank 0, the only rank that calls it."""
    box = [make() if is_main_process() else None]
    if is_distributed():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_from_ranks(value):
    """Return the list of every rank's `value`, in the order of ranks."""
    values = [value] * get_world_size()
    if is_distributed():
        dist.all_gather_object(values, value)
    return values


def broadcast_tensors(tensors):
    """Overwrite `tensors` on every rank by those of rank 0."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def sum_over_ranks(values, device):
    """Return the sums over all ranks of a list of numbers."""
    if not is_distributed():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def average_gradients(parameters, sums=None):
    """Replace the gradients of `parameters` by their means over all ranks; a missing one counts as zero.

    `sums`, a tensor, is replaced by its sum over all ranks on the way. Raises RuntimeError if a rank is gone.
    """
    if get_world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    together = torch.cat([gradient.flatten() for gradient in gradients])  # one message a step
    works = [dist.all_reduce(tensor, async_op=True) for tensor in ([together] if sums is None else [together, sums])]
    for work in works:
        work.wait()
    together.div_(get_world_size())
    for gradient, mean in zip(gradients, together.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
