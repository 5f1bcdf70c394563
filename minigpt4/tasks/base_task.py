"""What differs between tasks: model, datasets, the loss of a batch, evaluation. The loop is the runner's."""

from itertools import chain
from typing import Any

import torch

from minigpt4.common.config import Config, DictConfig
from minigpt4.common.device import in_run_precision, to_device
from minigpt4.common.dist_utils import get_rank, get_world_size, run_device, sum_over_ranks
from minigpt4.common.logger import batch_size
from minigpt4.common.registry import registry

VALIDATION = ("val", "eval", "valid", "validation")  # words for one split, in datasets and in run.valid_splits
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
        """Return the model of the `model` section on the run's device, in its precision."""
        model_cfg = in_run_precision(cfg.model_cfg, cfg.run_cfg)
        cls = registry.get_model_class(model_cfg.arch)
        return cls.from_config(model_cfg, device=run_device(cfg.run_cfg))

    def build_datasets(self, cfg: Config) -> Datasets:
        """Return {dataset name: {split: dataset}} of the `datasets` section.

        Raises ValueError if the length of an epoch cannot be known: streams have no end.
        """
        from minigpt4.datasets.datasets.map_style import adapted

        datasets, streams = {}, []
        for name, section in cfg.datasets_cfg.items():
            builder = registry.get_builder_class(section.get("builder") or name)(section, name)
            splits = builder.build_datasets().items()  # a user's own may give datasets of torch
            vis_processor = builder.vis_processors.get("train")
            datasets[name] = {split: adapted(dataset, name, vis_processor) for split, dataset in splits}
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

    def build_train_loader(self, datasets: Datasets, run_cfg: DictConfig, seed: int | None = None) -> Any:
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

    def build_eval_loaders(self, datasets: Datasets, run_cfg: DictConfig, splits: list[str]) -> dict[str, list]:
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
                there = "; ".join(f"{name}: {', '.join(of_dataset)}" for name, of_dataset in datasets.items())
                raise ValueError(f"{where}: no dataset has a split '{split}' (there are: {there})")
            # an iterable dataset with `epochs` ends by itself
            sizes = [len(each) if hasattr(each, "__len__") else getattr(each, "epochs", None) for each in of_split]
            if not all(sizes):
                raise ValueError(f"{where}: '{split}' is empty or a stream without an end; it needs map-style data")
            options = (run_cfg.batch_size_eval, run_cfg.num_workers, run_cfg.max_bad_fraction)
            loaders[split] = [EvalLoader(dataset, place, *options) for dataset in of_split]
        return loaders

    def train_step(self, model: torch.nn.Module, samples: dict[str, Any]) -> torch.Tensor:
        """Return the loss of one batch, a scalar tensor."""
        return model(samples)["loss"]

    def loss_and_targets(self, model: torch.nn.Module, samples: dict[str, Any]) -> tuple[torch.Tensor, int | None]:
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

    @torch.no_grad()
    def evaluation(self, model: torch.nn.Module, loaders: list, device: torch.device) -> float:
        """Return the mean loss per item (see `valid_step`) over all ranks. Raises ValueError for no item."""
        model.eval()
        loss_sum, count = 0.0, 0
        for index, samples in enumerate(chain.from_iterable(loaders)):  # what it draws is the same every time
            loss, num_items = self.valid_step(model, to_device(samples, device) | {"iters": index})
            loss_sum, count = loss_sum + loss * num_items, count + num_items
        loss_sum, count = sum_over_ranks([loss_sum, count], device)
        if not count:
            raise ValueError("run.valid_splits, run.test_splits: no sample of the split could be used, see above")
        return loss_sum / count
