"""`run.shard_llm`: into how many shares a run divides its LLM, and what cannot be divided."""

from minigpt4.common.config import Config, Problem
from minigpt4.common.config_report import ConfigError
from minigpt4.common.dist_utils import main_print
from minigpt4.common.registry import registry


def num_shares(cfg: Config, num_ranks: int) -> int:
    """Return how many shares the LLM of a run of `num_ranks` processes has, 1: each holds it whole.

    Raises ConfigError for an LLM that cannot be divided, or that a training cannot spread by `model.device_map`.
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
        main_print("run.shard_llm: one process has nobody to share the LLM with; it holds it whole")
    if problems:
        raise ConfigError(problems)
    return num_ranks
