"""A run from its configuration: processes, datasets, model and runner, built in this order."""

from minigpt4.common.config import Config
from minigpt4.common.registry import registry
from minigpt4.common.startup import startup


def train(cfg: Config) -> None:
    """Build everything that `cfg` names and train it. Raises ValueError or OSError for what is found wrong later."""
    runner_class = registry.get_runner_class(cfg.run_cfg.runner)
    task = registry.get_task_class(cfg.run_cfg.task).setup_task(cfg=cfg)
    # each `begin` ends a phase of the start-up times in the log
    startup.begin("processes")
    with runner_class.launched(cfg) as job_id:
        startup.begin("datasets")
        datasets = task.build_datasets(cfg)
        startup.begin("model")
        model = task.build_model(cfg)
        startup.begin("optimizer")
        runner_class(cfg=cfg, task=task, model=model, datasets=datasets, job_id=job_id).train()
