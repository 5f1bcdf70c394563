"""Two ranks without a launcher: forks of the test's process, which start in one second instead of ten."""

import logging
import multiprocessing
import sys

import pytest
import torch


def be_a_rank(rank, folder, work):
    """Call `work(rank)` in a process group of two; its output goes to a file of its own."""
    sys.stdout = sys.stderr = open(folder / f"{rank}.txt", "w", buffering=1)  # noqa: SIM115
    logging.basicConfig(stream=sys.stderr, force=True)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    work(rank)
    torch.distributed.destroy_process_group()


@pytest.fixture
def two_ranks(tmp_path):
    """Return a function that runs `work(rank)` on two ranks until rank 0 ends.

    It returns the exit code of rank 0 and the output of each rank until then.
    """
    started, folder = [], tmp_path / "ranks"
    folder.mkdir()

    def run(work):
        fork = multiprocessing.get_context("fork")
        started.extend(
            fork.Process(target=be_a_rank, args=(rank, folder, work)) for rank in range(2)
        )
        for process in started:
            process.start()
        started[0].join(60)
        return started[0].exitcode, *((folder / f"{rank}.txt").read_text() for rank in range(2))

    yield run
    for process in started:
        process.kill()
        process.join()
