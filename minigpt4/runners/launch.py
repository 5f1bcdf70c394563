"""How a process joins and leaves a run."""

from collections.abc import Iterator
from contextlib import contextmanager

from minigpt4.common import dist_utils
from minigpt4.common.config import Config
from minigpt4.common.device import explained_out_of_memory
from minigpt4.common.logger import setup_logger
from minigpt4.common.registry import registry
from minigpt4.common.startup import read_ahead


@contextmanager
def launched(cfg: Config) -> Iterator[str | None]:
    """Join the process group, set up log and seeds, and start reading weight files ahead; leave the group at the end.

    Yields the runner's `job_id`, here None. Until training, all ranks draw the same random numbers (e.g. new weights).
    """
    launch = dist_utils.init_distributed_mode(cfg.run_cfg)
    try:
        dist_utils.setup_seeds(cfg.run_cfg.seed)
        setup_logger()
        cfg.pretty_print()
        if cfg.run_cfg.read_ahead and not launch.local_rank:  # one process reads for all
            read_ahead(registry.get_model_class(cfg.model_cfg.arch).weight_files(cfg.model_cfg))
        with explained_out_of_memory(cfg.run_cfg):
            yield None
    except BaseException:
        dist_utils.leave_process_group(after_error=True)
        raise
    dist_utils.leave_process_group()
