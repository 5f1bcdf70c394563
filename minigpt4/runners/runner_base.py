"""A run from start to end: processes, device, optimizer, epochs, checkpoints, resume, and what is said about it."""

import logging
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from minigpt4.common import dist_utils
from minigpt4.common.checkpoint import load_checkpoint, load_optimizer, save_checkpoint
from minigpt4.common.device import build_scaler, resolve_device
from minigpt4.common.dist_utils import from_main, main_print
from minigpt4.common.logger import RunLog, setup_logger, whole_seconds
from minigpt4.common.optims import build_optimizer
from minigpt4.common.registry import registry
from minigpt4.common.utils import expand_path
from minigpt4.runners.plan import parts_table, print_plan
from minigpt4.runners.run_config import RunConfig, find_problems


@registry.register_runner("runner_base")
class RunnerBase:
    """Trains, or with `run.evaluate` evaluates, `model` on `datasets` ({name: {split: dataset}}) by `task`.

    `job_id` names the folder below `run.output_dir`, by default the time at which training starts; one that is taken
    gets a number. After the constructor the model, the same on every rank, is on the device.
    """

    Config = RunConfig

    def __init__(self, cfg, task, model, datasets, job_id=None):
        self.config, self.run_cfg, self.task, self.datasets, self.job_id = cfg, cfg.run_cfg, task, datasets, job_id
        self.device = resolve_device(self.run_cfg.device, self.run_cfg.gpu)
        self.model = model if model.device == self.device else model.to(self.device)
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        dist_utils.broadcast_tensors([parameter.data for parameter in self.trainable])
        self.max_epoch, self.start_epoch = self.run_cfg.max_epoch, 0
        self.output_dir = self.result_dir = self.last_checkpoint = None
        if not self.run_cfg.evaluate:
            self.optimizer = build_optimizer(self.model, self.run_cfg, self.device)
            self.scaler = build_scaler(self.model, self.run_cfg.amp, self.device)

    @classmethod
    def preflight(cls, cfg, where):
        """Return the problems of the `run` section, as lines; nothing is loaded."""
        return find_problems(cfg, where)

    @staticmethod
    def print_plan(cfg, gpu_memory_gib=None):
        """Print what the configuration would train, and return an exit code; see `plan.print_plan`."""
        return print_plan(cfg, gpu_memory_gib)

    @staticmethod
    @contextmanager
    def session(cfg):
        """Start this process's part of the run and end it: process group, log, seeds.

        Gives None, or what the runner shall take as its `job_id`. All ranks draw the same numbers until training
        starts, so that new weights are the same everywhere.
        """
        dist_utils.init_distributed_mode(cfg.run_cfg)
        try:
            dist_utils.setup_seeds(cfg.run_cfg.seed)
            setup_logger()
            cfg.pretty_print()
            yield None
        except BaseException:
            dist_utils.leave_process_group(after_error=True)
            raise
        dist_utils.leave_process_group()

    def train(self, loader=None):
        """Train from the first or the resumed epoch to the last; a checkpoint and a line in `log.txt` after each.

        `loader`: an endless iterator of batches, with `run.iters_per_epoch` set; None builds it from the datasets.
        Raises ValueError or OSError for what only now turns out to be wrong: checkpoint, data, disk, a loss of nan.
        """
        if self.run_cfg.resume_ckpt_path:
            self._resume()
        if self.run_cfg.evaluate:
            return self.evaluate()
        if self.start_epoch >= self.max_epoch:
            return main_print(
                f"Nothing left to train: '{self.run_cfg.resume_ckpt_path}' has finished epoch {self.start_epoch - 1} "
                f"and run.max_epoch is {self.max_epoch}; raise run.max_epoch to go on"
            )
        eval_loaders = self.task.build_eval_loaders(self.datasets, self.run_cfg, self.run_cfg.valid_splits)
        self.train_loader = loader or self.task.build_train_loader(self.datasets, self.run_cfg, self.start_epoch)
        self.iters_per_epoch = self.run_cfg.iters_per_epoch or self.train_loader.epoch_length()
        schedule = registry.get_lr_scheduler_class(self.run_cfg.lr_sched)
        self.lr_scheduler = schedule(self.optimizer, self.run_cfg, self.iters_per_epoch)
        self._open_output()
        self._introduce()
        try:
            self._train_epochs(eval_loaders)
        finally:
            self.log.close()
            if loader is None:
                self.train_loader.close()

    def _train_epochs(self, eval_loaders):
        start, samples_seen, is_saved = time.time(), 0, False
        for epoch in range(self.start_epoch, self.max_epoch):
            dist_utils.setup_seeds(self.run_cfg.seed, dist_utils.get_rank(), epoch)
            logging.info("Start training")
            logging.info("Start training epoch %d, %d iters per inner epoch.", epoch, self.iters_per_epoch)
            stats, samples_seen = self.task.train_epoch(self, epoch, samples_seen)
            is_saved = self._save(epoch)
            losses = self._split_losses(eval_loaders)
            self.log.epoch({f"train_{name}": value for name, value in stats.items()} | losses)
            dist_utils.barrier()
        self._sum_up(time.time() - start, samples_seen)
        if not is_saved:
            raise OSError(f"the last epoch's checkpoint could not be written to '{self.output_dir}', see above")

    def evaluate(self):
        """Return {split: mean loss} of `valid_splits` and `test_splits`, logged and written to `log.txt`."""
        start = time.time()
        splits = [*self.run_cfg.valid_splits, *self.run_cfg.test_splits]
        loaders = self.task.build_eval_loaders(self.datasets, self.run_cfg, splits)
        self._open_output()
        losses = self._split_losses(loaders)
        self.log.epoch(losses)
        main_print(f"Evaluation time {whole_seconds(time.time() - start)}")
        return losses

    def _resume(self):
        """Load the run's state at the end of an epoch; to evaluate, only its weights."""
        where = "run.resume_ckpt_path"
        state, path = load_checkpoint(self.run_cfg.resume_ckpt_path, where)
        self.model.load_trainable(state["model"], where, path=path)
        if not self.run_cfg.evaluate:
            load_optimizer(self.optimizer, state["optimizer"], where)
            if self.scaler.is_enabled() and state["scaler"]:  # None or {}: written by a run without one
                self.scaler.load_state_dict(state["scaler"])
            self.start_epoch = int(state["epoch"]) + 1
        logging.info("Resume checkpoint from %s", path)

    def _open_output(self):
        root = expand_path(self.run_cfg.output_dir)
        self.output_dir = from_main(lambda: _new_folder(root, self.job_id or time.strftime("%Y%m%d%H%M")))
        self.job_id, self.result_dir = self.output_dir.name, self.output_dir / "result"
        self.log = RunLog(self.output_dir, self.run_cfg.tensorboard)
        self.log.config(self.config.to_dict())

    def _introduce(self):
        """Say what is trained on what; the lines of the 2023 release, and a table."""
        train = [splits["train"] for splits in self.datasets.values() if "train" in splits]
        if len(train) > 1:
            ratios = [dataset.sample_ratio for dataset in train]
            mix = ", ".join(f"{dataset.name} {dataset.sample_ratio or 1:g}" for dataset in train)
            logging.info("Each batch is of one dataset, drawn by %s", mix if any(ratios) else "equal ratios")
        for dataset in train:
            if hasattr(dataset, "__len__"):
                logging.info("Loaded %d records for train split from the dataset.", len(dataset))
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                main_print(name)
        main_print(f"number of trainable parameters: {sum(parameter.numel() for parameter in self.trainable)}")
        main_print(parts_table(self.model.parts()))
        if not self.run_cfg.valid_splits:
            logging.info("No validation splits found.")

    def _save(self, epoch):
        """Write `checkpoint_<epoch>.pth` from rank 0; return whether it is there."""
        if not dist_utils.is_main_process():
            return True
        path = self.output_dir / f"checkpoint_{epoch}.pth"
        logging.info("Saving checkpoint at epoch %d to %s.", epoch, path)
        state = {
            "model": self.model.trainable_state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "config": self.config.to_dict(),
            "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
            "epoch": epoch,
        }
        is_saved = save_checkpoint(path, state)
        self.last_checkpoint = path if is_saved else self.last_checkpoint
        return is_saved

    def _split_losses(self, loaders):
        """Return {"<split>_loss": mean loss} of {split: loaders}, logged."""
        losses = {}
        for split, each in loaders.items():
            losses[f"{split}_loss"] = self.task.evaluation(self.model, each, self.device)
            logging.info("Evaluation on %s: loss %.4f", split, losses[f"{split}_loss"])
        return losses

    def _sum_up(self, seconds, samples_seen):
        """Say how it went and what to do next."""
        main_print(f"Training time {whole_seconds(seconds)}")
        main_print(f"Samples seen: {samples_seen}; log and metrics: {self.output_dir}")
        for report in getattr(self.train_loader, "skip_report", dict)().items():
            self._print_skipped(*report)
        if self.last_checkpoint:
            main_print(f"Checkpoint: {self.last_checkpoint}")
            main_print(f"Next: use these weights by --options model.ckpt={self.last_checkpoint}")

    @staticmethod
    def _print_skipped(name, counts):
        total = sum(map(Counter, dist_utils.gather_from_ranks(counts)), Counter())
        met = total.pop("seen", 0)
        reasons = ", ".join(f"{count} {reason}" for reason, count in total.items())
        main_print(f"{name}: {total.total()} of {met} samples skipped{f' ({reasons})' if reasons else ''}")


def _new_folder(root, name):
    """Return a folder below `root` that did not exist before, with `result/` in it."""
    for folder in (Path(root) / (name if n == 1 else f"{name}-{n}") for n in range(1, 10_000)):
        try:
            folder.mkdir(parents=True)
            (folder / "result").mkdir()
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise OSError(
                f"run.output_dir: cannot make a folder in '{root}' ({error}); choose another place"
            ) from error
    raise OSError(f"run.output_dir: '{root}' is full of runs named {name}")
