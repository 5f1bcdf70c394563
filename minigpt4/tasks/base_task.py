"""What differs between tasks: model, datasets, the loss of a batch, evaluation. The loop is the runner's."""

from collections.abc import Callable
from typing import Any

import torch

from minigpt4.common.config import Config, DictConfig
from minigpt4.common.device import in_run_precision
from minigpt4.common.dist_utils import get_rank, get_world_size
from minigpt4.common.launchers import run_device
from minigpt4.common.llm_shares import num_shares
from minigpt4.common.logger import batch_size
from minigpt4.common.registry import registry
from minigpt4.common.utils import expand_path
from minigpt4.tasks.held_out import HeldOut, held_out_losses

# words for one split, in datasets and in run.valid_splits
VALIDATION = ("val", "eval", "valid", "validation")
# what says that a task has a loss of its own
_LOSSES = ("train_step", "loss_and_targets", "valid_step")
Datasets = dict[str, dict[str, Any]]  # {dataset name: {split: dataset}}


class BaseTask:
    """Builds by name through the registry and trains with the loss that the model gives."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "train_epoch" in vars(cls) or "_train_inner_loop" in vars(cls):
            raise ValueError(
                f"{cls.__module__}.{cls.__qualname__} has a training loop of its own, which is the runner's now: for "
                "another loss override train_step(model, samples); for another loop register a subclass of "
                "minigpt4.runners.RunnerBase with its own train_epoch(epoch, metrics), and set run.runner"
            )

    @classmethod
    def setup_task(cls, cfg: Config) -> "BaseTask":
        """Return the task; a subclass may read its settings from `cfg.run_cfg` here."""
        return cls()

    def build_model(self, cfg: Config) -> torch.nn.Module:
        """Return the model of the `model` section on the run's device, in its precision. Raises ConfigError."""
        model_cfg = in_run_precision(cfg.model_cfg, cfg.run_cfg)
        cls = registry.get_model_class(model_cfg.arch)
        device, is_shared = run_device(cfg.run_cfg), num_shares(cfg, get_world_size()) > 1
        cls.settle_training(model_cfg, device, is_shared)
        return cls.from_config(
            model_cfg, device=device, **({"shard_llm": True} if is_shared else {})
        )

    def build_datasets(self, cfg: Config) -> Datasets:
        """Return {dataset name: {split: dataset}} of the `datasets` section.

        Raises ValueError if the length of an epoch cannot be known: streams have no end.
        """
        from minigpt4.datasets.datasets.map_style import adapted
        from minigpt4.datasets.datasets.shard_cache import ShardCache

        datasets, streams = {}, []
        cache = None
        if folder := getattr(cfg.run_cfg, "shard_cache", None):
            cache = ShardCache(expand_path(folder), int(cfg.run_cfg.shard_cache_gb * 1e9))
        for name, section in cfg.datasets_cfg.items():
            builder = registry.get_builder_class(section.get("builder") or name)(section, name)
            splits = builder.build_datasets().items()  # a user's own may give datasets of torch
            vis_processor = builder.vis_processors.get("train")
            datasets[name] = {
                split: adapted(dataset, name, vis_processor) for split, dataset in splits
            }
            for dataset in datasets[name].values():
                if hasattr(dataset, "shard_cache"):
                    dataset.shard_cache = cache
            if train := datasets[name].get("train"):
                train.name = name
                for key in ("sample_ratio", "batch_size"):
                    setattr(train, key, section.get(key))
            if "train" in datasets[name] and not hasattr(datasets[name]["train"], "__len__"):
                streams.append(name)
        if streams and cfg.run_cfg.iters_per_epoch is None and not cfg.run_cfg.evaluate:
            raise ValueError(
                f"run.iters_per_epoch: missing, and shards have no end ({', '.join(streams)}); say how many steps make "
                "an epoch, e.g. --options run.iters_per_epoch=5000"
            )
        return datasets

    def build_train_loader(
        self, datasets: Datasets, run_cfg: DictConfig, seed: int | None = None
    ) -> Any:
        """Return an endless iterator of this rank's training batches, drawn by `seed`, else `run.seed`."""
        from minigpt4.datasets.datasets.dataloader_utils import TrainLoader

        return TrainLoader(
            [splits["train"] for splits in datasets.values() if "train" in splits],
            batch_size=run_cfg.batch_size_train,
            num_workers=run_cfg.num_workers,
            seed=run_cfg.seed if seed is None else seed,
            rank=get_rank(),
            world_size=get_world_size(),
            max_bad_fraction=run_cfg.max_bad_fraction,
        )

    def build_eval_loaders(
        self, datasets: Datasets, run_cfg: DictConfig, splits: list[str]
    ) -> dict[str, list]:
        """Return {split: [loader of this rank's share, one a dataset]}; see VALIDATION. Raises ValueError."""
        from minigpt4.datasets.datasets.base_dataset import Place
        from minigpt4.datasets.datasets.dataloader_utils import EvalLoader

        where, loaders = "run.valid_splits, run.test_splits", {}
        place = Place(run_cfg.seed, get_rank(), get_world_size())
        for split in splits:
            words = VALIDATION if split in VALIDATION else (split,)
            of_split = []
            for of_dataset in datasets.values():
                of_split += [of_dataset[word] for word in (split, *words) if word in of_dataset][:1]
            if not of_split:
                there = "; ".join(
                    f"{name}: {', '.join(of_dataset)}" for name, of_dataset in datasets.items()
                )
                raise ValueError(f"{where}: no dataset has a split '{split}' (there are: {there})")
            # an iterable dataset with `epochs` ends by itself
            sizes = [
                len(each) if hasattr(each, "__len__") else getattr(each, "epochs", None)
                for each in of_split
            ]
            if not all(sizes):
                raise ValueError(
                    f"{where}: '{split}' is empty or a stream without an end; it needs map-style data"
                )
            options = (
                run_cfg.batch_size_eval,
                run_cfg.num_workers,
                run_cfg.max_bad_fraction,
                run_cfg.eval_controls,
            )
            loaders[split] = [EvalLoader(dataset, place, *options) for dataset in of_split]
        return loaders

    def train_step(self, model: torch.nn.Module, samples: dict[str, Any]) -> torch.Tensor:
        """Return the loss of one batch, a scalar tensor."""
        return model(samples)["loss"]

    def loss_and_targets(
        self, model: torch.nn.Module, samples: dict[str, Any]
    ) -> tuple[torch.Tensor, int | None]:
        """Return (`train_step`'s loss, how many target tokens it is the mean of).

        None: the model does not count them, or a task has a `train_step` of its own, whose loss this is.
        """
        if getattr(self.train_step, "__func__", None) is not BaseTask.train_step:
            return self.train_step(model, samples), None
        outputs = model(samples)
        return outputs["loss"], int(outputs["num_targets"]) if "num_targets" in outputs else None

    def valid_step(self, model: torch.nn.Module, samples: dict[str, Any]) -> tuple[float, int]:
        """Return (loss of one batch, how many items it is the mean of): target tokens if the model counts them.

        They are samples where it does not, or where a task has a `train_step` of its own, whose loss this is.
        """
        loss, num_targets = self.loss_and_targets(model, samples)
        return loss.item(), batch_size(samples) if num_targets is None else num_targets

    def has_sample_losses(self, model: torch.nn.Module) -> bool:
        """Return whether `sample_losses` is there: the model has `row_losses`, and the task no loss of its own."""
        own = [
            name
            for name in _LOSSES
            if getattr(getattr(self, name), "__func__", None) is not vars(BaseTask)[name]
        ]
        return hasattr(model, "row_losses") and not own

    def sample_losses(
        self, model: torch.nn.Module, samples: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (sum of the loss over each sample's target tokens [B], how many these are [B])."""
        outputs = model(samples, reduction="none")
        return outputs["loss"], outputs["num_targets"]

    def evaluation(self, model: torch.nn.Module, loaders: list, device: torch.device) -> float:
        """Return the mean loss per item (see `valid_step`) over all ranks. Raises ValueError for no item."""
        return held_out_losses(self, model, loaders, device).loss

    def held_out(
        self,
        model: torch.nn.Module,
        loaders: list,
        device: torch.device,
        is_told_to_end: Callable[[], bool],
    ) -> HeldOut | None:
        """Return loss and controls of a split, as `held_out_losses`; of a task's own `evaluation` the loss alone."""
        if getattr(self.evaluation, "__func__", None) is not BaseTask.evaluation:
            return HeldOut(self.evaluation(model, loaders, device))
        return held_out_losses(self, model, loaders, device, is_told_to_end)
