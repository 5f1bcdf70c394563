"""What differs between tasks: model, datasets, the loss of a batch, evaluation. The training loop is the runner's."""

import copy
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

# names of the validation split, in datasets and in run.valid_splits; they mean the same
VALIDATION = ("val", "eval", "valid", "validation")
# a task that overrides one of these methods has a loss of its own
_LOSS_METHODS = ("train_step", "loss_and_targets", "valid_step")
Datasets = dict[str, dict[str, Any]]  # {dataset name: {split: dataset}}


def _split_names(datasets: Datasets) -> str:
    """Return the splits of each dataset as text."""
    return "; ".join(f"{name}: {', '.join(splits)}" for name, splits in datasets.items())


class BaseTask:
    """Builds model and datasets by name through the registry, and trains with the loss that the model returns."""

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
        """Return the model of the `model` section, on the device and in the precision of the run. Raises ConfigError."""
        model_cfg = in_run_precision(cfg.model_cfg, cfg.run_cfg)
        cls = registry.get_model_class(model_cfg.arch)
        device = run_device(cfg.run_cfg)
        is_sharded = num_shares(cfg, get_world_size()) > 1
        cls.settle_training(model_cfg, device, is_sharded)
        # passed only if set: a user's own `from_config` may not have the argument
        options = {"shard_llm": True} if is_sharded else {}
        return cls.from_config(model_cfg, device=device, **options)

    def build_datasets(self, cfg: Config) -> Datasets:
        """Return {dataset name: {split: dataset}} of the `datasets` section.

        Raises ValueError if `run.iters_per_epoch` is missing and a training dataset is a stream, which has no length.
        """
        from minigpt4.datasets.datasets.map_style import adapted
        from minigpt4.datasets.datasets.shard_cache import ShardCache

        cache = None
        if folder := getattr(cfg.run_cfg, "shard_cache", None):
            cache = ShardCache(expand_path(folder), int(cfg.run_cfg.shard_cache_gb * 1e9))
        datasets, streams = {}, []
        for name, section in cfg.datasets_cfg.items():
            # A user's own builder may return plain datasets of torch, which are adapted.
            builder = registry.get_builder_class(section.get("builder") or name)(section, name)
            vis_processor = builder.vis_processors.get("train")
            datasets[name] = {}
            for split, dataset in builder.build_datasets().items():
                dataset = adapted(dataset, name, vis_processor)
                if split != "train" and not dataset.is_val:
                    dataset = copy.copy(dataset)  # one dataset may be given for several splits
                    dataset.set_split(True)
                if hasattr(dataset, "shard_cache"):
                    dataset.shard_cache = cache
                datasets[name][split] = dataset
            # The training loader reads these attributes.
            if train := datasets[name].get("train"):
                train.name = name
                train.batch_size = section.get("batch_size")
                if section.get("sample_ratio") is not None:
                    train.sample_ratio = section["sample_ratio"]
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
        """Return an endless iterator over this rank's training batches, drawn with `seed`, by default `run.seed`.

        Raises ValueError if none of the datasets has a split `train`. Without datasets, the caller brings batches.
        """
        from minigpt4.datasets.datasets.dataloader_utils import TrainLoader

        train = [splits["train"] for splits in datasets.values() if "train" in splits]
        if datasets and not train:
            raise ValueError(
                f"datasets: none has a split 'train' (there are: {_split_names(datasets)})"
            )
        return TrainLoader(
            train,
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
        """Return {split: [one loader per dataset, over this rank's share]}; the names in VALIDATION are one split.

        Raises ValueError for a split that no dataset has, or that is empty or has no end.
        """
        from minigpt4.datasets.datasets.base_dataset import Place
        from minigpt4.datasets.datasets.dataloader_utils import EvalLoader

        where, loaders = "run.valid_splits, run.test_splits", {}
        place = Place(run_cfg.seed, get_rank(), get_world_size())
        for split in splits:
            # From each dataset the split of this name, else of another name for the same.
            names = (split, *VALIDATION) if split in VALIDATION else (split,)
            found = []
            for its_splits in datasets.values():
                found += [its_splits[name] for name in names if name in its_splits][:1]
            if not found:
                there = _split_names(datasets)
                raise ValueError(f"{where}: no dataset has a split '{split}' (there are: {there})")
            # An iterable dataset with `epochs` ends by itself.
            sizes = [
                len(dataset) if hasattr(dataset, "__len__") else getattr(dataset, "epochs", None)
                for dataset in found
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
            loaders[split] = [EvalLoader(dataset, place, *options) for dataset in found]
        return loaders

    def train_step(self, model: torch.nn.Module, samples: dict[str, Any]) -> torch.Tensor:
        """Return the loss of one batch, a scalar tensor."""
        return model(samples)["loss"]

    def loss_and_targets(
        self, model: torch.nn.Module, samples: dict[str, Any]
    ) -> tuple[torch.Tensor, int | None]:
        """Return (loss of one batch, number of target tokens that it is the mean over).

        The number is None if the model does not count them, or if the task overrides `train_step`, whose loss this is.
        """
        if getattr(self.train_step, "__func__", None) is not BaseTask.train_step:
            return self.train_step(model, samples), None
        outputs = model(samples)
        num_targets = int(outputs["num_targets"]) if "num_targets" in outputs else None
        return outputs["loss"], num_targets

    def valid_step(self, model: torch.nn.Module, samples: dict[str, Any]) -> tuple[float, int]:
        """Return (loss of one batch, number of items that it is the mean over).

        The items are target tokens; samples if the model does not count tokens or the task overrides `train_step`.
        """
        loss, num_targets = self.loss_and_targets(model, samples)
        return loss.item(), batch_size(samples) if num_targets is None else num_targets

    def has_sample_losses(self, model: torch.nn.Module) -> bool:
        """Return whether `sample_losses` works: the model has `row_losses`, and the task has no loss of its own."""
        for name in _LOSS_METHODS:
            if getattr(getattr(self, name), "__func__", None) is not vars(BaseTask)[name]:
                return False
        return hasattr(model, "row_losses")

    def sample_losses(
        self, model: torch.nn.Module, samples: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (sum of the loss over each sample's target tokens [B], number of these tokens [B])."""
        outputs = model(samples, reduction="none")
        return outputs["loss"], outputs["num_targets"]

    def evaluation(self, model: torch.nn.Module, loaders: list, device: torch.device) -> float:
        """Return the mean loss per item (see `valid_step`) over all ranks. Raises ValueError if there is no item."""
        return held_out_losses(self, model, loaders, device).loss

    def held_out(
        self,
        model: torch.nn.Module,
        loaders: list,
        device: torch.device,
        is_told_to_end: Callable[[], bool],
    ) -> HeldOut | None:
        """Return loss and controls of a split, as `held_out_losses`; only the loss if the task overrides `evaluation`."""
        if getattr(self.evaluation, "__func__", None) is not BaseTask.evaluation:
            return HeldOut(self.evaluation(model, loaders, device))
        return held_out_losses(self, model, loaders, device, is_told_to_end)
