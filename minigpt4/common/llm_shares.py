"""`run.shard_llm`: the number of shares (shards) of a run's LLM, and a check that it can be divided."""

from minigpt4.common.config import Config, Problem
from minigpt4.common.config_report import ConfigError
from minigpt4.common.dist_utils import main_print
from minigpt4.common.registry import registry


def num_shares(cfg: Config, num_ranks: int) -> int:
    """Return into how many shares a run of `num_ranks` processes divides its LLM; 1: each process holds all of it.

    Raises ConfigError if the LLM cannot be divided, and for `model.device_map`, which training does not support.
    """
    problems = []
    if cfg.model_cfg.get("device_map", "none") != "none":
        advice = "unset it; in training, run.shard_llm=True divides the LLM among the processes of torchrun"
        problems.append(
            Problem("model.device_map", f"spreads the LLM of a chat or an evaluation; {advice}")
        )
    if not cfg.run_cfg.get("shard_llm"):
        num_ranks = 1
    elif refusal := registry.get_model_class(cfg.model_cfg.arch).refusal_to_shard(cfg.model_cfg):
        problems.append(Problem("run.shard_llm", refusal))
    elif num_ranks == 1:
        main_print(
            "run.shard_llm: a single process has no other to divide the LLM with, and holds the whole LLM"
        )
    if problems:
        raise ConfigError(problems)
    return num_ranks
