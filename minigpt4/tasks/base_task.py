"""What a run does with models and datasets: build them, train an epoch, evaluate. The training step is here."""

import torch

from minigpt4.common.device import resolve_device, set_precision, to_device
from minigpt4.common.dist_utils import average_gradients, sum_over_ranks
from minigpt4.common.registry import registry
from minigpt4.common.startup import startup


class BaseTask:
    """Builds by name through the registry and trains with the loss that the model gives."""

    @classmethod
    def setup_task(cls, cfg):
        """Return the task; a subclass may read its settings from `cfg.run_cfg` here."""
        return cls()

    def build_model(self, cfg):
        """Return the model of the `model` section, on the run's device and in the run's precision."""
        set_precision(cfg.model_cfg, cfg.run_cfg)
        device = resolve_device(cfg.run_cfg.device, cfg.run_cfg.gpu)
        return registry.get_model_class(cfg.model_cfg.arch).from_config(cfg.model_cfg, device=device)

    def build_datasets(self, cfg):
        """Return {dataset name: {split: dataset}} of the `datasets` section.

        Raises ValueError if the length of an epoch cannot be known: streams have no end.
        """
        datasets = {}
        for name, section in cfg.datasets_cfg.items():
            builder = registry.get_builder_class(section.get("builder") or name)
            datasets[name] = builder(section, name).build_datasets()
        streams = [
            name for name, splits in datasets.items() if "train" in splits and not hasattr(splits["train"], "__len__")
        ]
        if streams and cfg.run_cfg.iters_per_epoch is None and not cfg.run_cfg.evaluate:
            raise ValueError(
                f"run.iters_per_epoch: missing, and shards have no end ({', '.join(streams)}); say how many steps make "
                "an epoch, e.g. --options run.iters_per_epoch=5000"
            )
        return datasets

    def build_train_loader(self, datasets, run_cfg, seed=None):
        """Return an endless iterator of this rank's training batches; a resumed run draws data anew, not again."""
        from minigpt4.datasets.datasets.dataloader_utils import TrainLoader

        return TrainLoader(
            [splits["train"] for splits in datasets.values() if "train" in splits],
            batch_size=run_cfg.batch_size_train,
            num_workers=run_cfg.num_workers,
            seed=run_cfg.seed if seed is None else seed,
            rank=run_cfg.rank,
            world_size=run_cfg.world_size,
            max_bad_fraction=run_cfg.max_bad_fraction,
        )

    def build_eval_loaders(self, datasets, run_cfg, splits):
        """Return {split: [loader of this rank's share, one a dataset]}.

        Raises ValueError if no dataset has such a split, or if it is empty or has no end.
        """
        from minigpt4.datasets.datasets.base_dataset import Place
        from minigpt4.datasets.datasets.dataloader_utils import EvalLoader

        where, loaders = "run.valid_splits, run.test_splits", {}
        place = Place(run_cfg.seed, run_cfg.rank, run_cfg.world_size)
        for split in splits:
            found = [of_dataset[split] for of_dataset in datasets.values() if split in of_dataset]
            if not found:
                there = "; ".join(f"{name}: {', '.join(of_dataset)}" for name, of_dataset in datasets.items())
                raise ValueError(f"{where}: no dataset has a split '{split}' (there are: {there})")
            sizes = [len(d) if hasattr(d, "__len__") else getattr(d, "epochs", None) for d in found]
            if not all(sizes):
                raise ValueError(f"{where}: '{split}' is empty or a stream without an end; it needs map-style data")
            settings = (run_cfg.batch_size_eval, run_cfg.num_workers, run_cfg.max_bad_fraction)
            loaders[split] = [EvalLoader(dataset, place, *settings) for dataset in found]
        return loaders

    def train_step(self, model, samples):
        """Return the loss of one batch, a scalar tensor."""
        return model(samples)["loss"]

    def train_epoch(self, run, epoch, metrics):
        """Train from step `metrics.index` to the end of the epoch; return {"lr", "loss"}, its means over all ranks.

        `run` is the runner: model, loader, optimizer, lr_scheduler, scaler, device and settings. Its `after_step` is
        called wherever no gradient waits for the optimizer; `metrics` is the epoch's MetricLogger.

        One optimizer step takes the gradients of `accum_grad_iters` batches: their mean, where the last one of an
        epoch may be of fewer batches; or, with `accum_reduction: sum`, their sum, where what an epoch leaves over
        goes into the first step of the next (Source: 2023 release).

        Raises NonFiniteLossError.
        """
        cfg, num_steps, accum = run.run_cfg, run.iters_per_epoch, run.run_cfg.accum_grad_iters
        is_mean = cfg.accum_reduction == "mean"
        run.model.train()
        is_bad = torch.zeros((), device=run.device)  # a loss that is not finite since the last optimizer step
        startup.begin("first step")
        for i in range(metrics.index, num_steps):
            lr = run.lr_scheduler.step(cur_epoch=epoch, cur_step=i)
            with metrics.fetching(), startup.phase("first batch"):
                samples = to_device(next(run.train_loader), run.device)
            samples |= {"epoch": epoch, "num_iters_per_epoch": num_steps, "iters": i}
            loss = self.add_gradient(run, samples, min(accum, num_steps - i + i % accum) if is_mean else 1)
            metrics.add(loss, lr, samples)
            is_bad += ~loss.detach().isfinite()
            is_step = (i + 1) % accum == 0 or (is_mean and i + 1 == num_steps)
            if is_step:
                is_skipped, ranks_interrupted = self.update(run, is_bad)
                metrics.updated(is_skipped)
                is_bad.zero_()
            metrics.check()  # the only place that waits for the device
            metrics.end_step()
            startup.finish()
            if is_step:
                run.after_step(epoch, metrics, ranks_interrupted)
        return metrics.end_epoch()

    def add_gradient(self, run, samples, window):
        """Add the gradient of a batch's loss, divided by `window`, to the parameters'; return the loss.

        With `max_tokens_per_batch` a larger batch is computed in parts, whose losses add up to the same mean.
        """
        limit, total = run.run_cfg.max_tokens_per_batch, 0
        for part, share in [(samples, 1)] if limit is None else run.model.split(samples, limit):
            loss = self.train_step(run.model, part) * share
            run.scaler.scale(loss / window).backward()
            total = total + loss.detach()
        return total

    def update(self, run, is_bad):
        """Make one optimizer step with the ranks' mean gradient, or none where a loss or gradient is not finite.

        Return (whether it was skipped, how many ranks want to end the run), tensors that are equal on all ranks.
        """
        flags = torch.stack([is_bad, is_bad.new_full((), run.interruption.signal is not None)])
        run.watch.arrived()
        average_gradients(run.trainable, flags)
        limit = run.run_cfg.max_grad_norm
        if limit is not None:
            run.scaler.unscale_(run.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(run.trainable, float("inf") if limit is None else limit)
        # A GradScaler that is at work looks for infinities itself, and meets some while it looks for its scale.
        is_skipped = (flags[0] > 0) | (~norm.isfinite() & (not run.scaler.is_enabled()))
        if run.scaler.is_enabled() or run.device.type == "cuda":
            if not run.scaler.is_enabled():
                run.optimizer.found_inf = is_skipped.float()  # the fused step then does nothing: no need to wait
            run.scaler.step(run.optimizer)
        elif not is_skipped:
            run.optimizer.step()
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        return is_skipped, flags[1]

    @torch.no_grad()
    def evaluation(self, model, loaders, device):
        """Return the mean loss per sample of the batches of all `loaders`, over all ranks."""
        model.eval()
        loss_sum, count = 0.0, 0
        for samples in (batch for loader in loaders for batch in loader):
            size = len(next(iter(samples.values())))
            loss_sum += self.train_step(model, to_device(samples, device)).item() * size
            count += size
        loss_sum, count = sum_over_ranks([loss_sum, count], device)
        if not count:
            raise ValueError("run.valid_splits, run.test_splits: no sample of the split could be used, see above")
        return loss_sum / count
