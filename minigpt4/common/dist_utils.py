"""The processes (ranks) of a run: the process group, collectives, seeds. All of it also works in a single process.

Gradients are averaged by one all-reduce an optimizer step, not by DistributedDataParallel: the gradient of
the projection is the last result of a backward pass, so there is no communication to overlap with it; and
frozen parameters and buffers are never inspected or sent.
"""

import importlib
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig

from minigpt4.common.launchers import Launch, launch_problems, launched_processes, run_device
from minigpt4.common.utils import first_line


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    return get_rank() == 0


def main_print(*args: Any) -> None:
    """Print to stdout, from rank 0 only. A line that cannot be written, or not in stdout's encoding, is lost."""
    if is_main_process():
        with suppress(OSError, UnicodeEncodeError):
            print(*args, flush=True)


def init_distributed_mode(run_cfg: DictConfig) -> Launch:
    """Join the process group (nccl on CUDA, else gloo), if this process is one of several.

    A rank that waits for another longer than `dist_timeout_s` ends with an error. Raises ValueError if the
    device is not available or the launch does not fit the `run` section, OSError if other ranks are missing.
    """
    if problems := launch_problems(run_cfg, "run"):
        raise ValueError("\n".join(map(str, problems)))
    launch, device = launched_processes(run_cfg), run_device(run_cfg)
    if is_on_gpu := device.type == "cuda":
        torch.cuda.set_device(device)
    if launch.local_rank is None or not run_cfg.distributed:
        print("Not using distributed mode", flush=True)
        return launch
    rank, world_size = launch[:2]
    print(f"| distributed init (rank {rank}, world {world_size}): {run_cfg.dist_url}", flush=True)
    timeout = timedelta(seconds=run_cfg.dist_timeout_s)
    # Import it before there is a group. Imported later, as by torch's optimizers, its functions would keep the group
    # as a default argument; gloo's threads then outlive `leave_process_group`, and the process may abort at its exit.
    importlib.import_module("torch.distributed.nn.functional")
    try:
        store, *_ = next(dist.rendezvous(run_cfg.dist_url, rank, world_size, timeout=timeout))
        # torchrun's agent may keep its store over restarts: without a prefix, a rank would connect to those of the last
        # attempt. A new store gets a fixed prefix, since an agent that was replaced counts its restarts from 0 again.
        is_kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if is_kept else "in a new store"
        dist.init_process_group(
            "nccl" if is_on_gpu else "gloo",
            store=dist.PrefixStore(f"attempt {attempt}", store),
            world_size=world_size,
            rank=rank,
            timeout=timeout,
            device_id=device if is_on_gpu else None,
        )
    except RuntimeError as error:
        reason = first_line(error)
        raise OSError(
            f"run.dist_url: rank {rank} could not join the other {world_size - 1} ({reason})"
        ) from error
    return launch


def leave_process_group(after_error: bool = False) -> None:
    """Destroy the process group, if any: a process that exits with it may abort.

    After an error an NCCL group is kept: destroying it would wait for ranks that wait for this one.
    """
    if is_distributed() and not (after_error and dist.get_backend() == "nccl"):
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until all ranks have called this."""
    if is_distributed():
        dist.barrier()


def note_progress() -> None:
    """Tell the ranks that wait in `patient_barrier` that this one is at work."""
    if is_distributed():
        _store().add("progress", 1)


def patient_barrier(patience_s: float) -> bool:
    """Wait until all ranks have called this, however long that takes, and return True.

    A collective of torch ends with an error after `dist_timeout_s`. This returns False if no rank calls `note_progress`
    for `patience_s` seconds.
    """
    if not is_distributed():
        return True
    store, world_size = _store(), get_world_size()
    arrived = store.add("arrived", 1)  # counts on from one call to the next
    all_arrived = -(-arrived // world_size) * world_size
    progress, since = store.add("progress", 0), time.monotonic()
    while store.add("arrived", 0) < all_arrived:
        time.sleep(0.1)
        if (now := store.add("progress", 0)) != progress:
            progress, since = now, time.monotonic()
        elif time.monotonic() - since > patience_s:
            return False
    return True


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()  # torch has no public name for it


def derived_seed(*numbers: int) -> int:
    """Return a seed derived from all `numbers` (0 or more) and their order."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def setup_seeds(seed: int, rank: int = 0, epoch: int = 0) -> None:
    """Seed the generators of Python, NumPy and torch from (seed, rank, epoch), each with a seed of its own."""
    streams = np.random.SeedSequence([seed, rank, epoch]).generate_state(3)
    random.seed(int(streams[0]))
    np.random.seed(int(streams[1]))
    torch.manual_seed(int(streams[2]))


def from_main(make: Callable[[], Any]) -> Any:
    """Call ``make()`` on rank 0 only, and return its result on every rank. Called by all ranks.

    A ValueError or OSError that it raises on rank 0 is raised on every rank; for any other exception, the other ranks
    raise RuntimeError.
    """
    outcome = [None, None]  # result, error
    if is_main_process():
        try:
            outcome[0] = make()
        except (ValueError, OSError) as error:
            outcome[1] = error
        except Exception as error:
            # Otherwise the other ranks would wait for the result until they time out.
            if is_distributed():
                told = RuntimeError(f"rank 0 failed: {type(error).__name__}: {error}")
                dist.broadcast_object_list([None, told], src=0)
            raise
    if is_distributed():
        dist.broadcast_object_list(outcome, src=0)
    result, error = outcome
    if error is not None:
        raise error
    return result


def gather_from_ranks(value: Any) -> list[Any]:
    """Return the `value` of every rank, in the order of ranks."""
    values = [value] * get_world_size()
    if is_distributed():
        dist.all_gather_object(values, value)
    return values


def broadcast_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite `tensors` on every rank with those of rank 0."""
    if is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the sum over all ranks of each of `values`."""
    if not is_distributed():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def max_over_ranks(value: int, device: torch.device) -> int:
    """Return the largest of all ranks' `value`."""
    if not is_distributed():
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def average_gradients(
    parameters: Sequence[torch.nn.Parameter], sums: torch.Tensor | None = None, weight: float = 1
) -> None:
    """Replace the gradients of `parameters` by their means over ranks, each rank weighted by its `weight`.

    A missing gradient counts as zero; one missing on all ranks stays None, so that the optimizer skips the parameter. The
    tensor `sums` is replaced by its sum over ranks. Raises RuntimeError if a rank is gone.
    """
    if get_world_size() == 1:
        return
    missing = [number for number, parameter in enumerate(parameters) if parameter.grad is None]
    for number in missing:
        parameters[number].grad = torch.zeros_like(parameters[number])
    gradients = [parameter.grad for parameter in parameters]
    # one all-reduce for all gradients, for which of them are present, and for the weight
    present = gradients[0].new_ones(len(gradients))
    present[missing] = 0
    flat = torch.cat([*map(torch.flatten, gradients), present, present.new_ones(1)])
    flat.mul_(weight)
    messages = [flat] if sums is None else [flat, sums]
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in messages]:
        work.wait()
    sizes = [*map(torch.numel, gradients), len(gradients)]
    *means, present = flat[:-1].div_(flat[-1]).split(sizes)
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))
    if missing:
        for number, is_present in zip(missing, present[missing].tolist(), strict=True):
            if not is_present:
                parameters[number].grad = None
