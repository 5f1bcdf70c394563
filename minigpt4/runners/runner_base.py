"""A run from start to end: processes, data, epochs, checkpoints, resume, evaluation."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from minigpt4.common import dist_utils
from minigpt4.common.config import Config as WholeConfig
from minigpt4.common.config import Problem
from minigpt4.common.dist_utils import derived_seed, from_main, main_print
from minigpt4.common.logger import MetricLogger, RunLog, whole_seconds
from minigpt4.common.registry import registry
from minigpt4.common.startup import startup
from minigpt4.common.utils import expand_path
from minigpt4.runners import report, run_card, trackers
from minigpt4.runners.data_timeout import data_watched
from minigpt4.runners.launch import launched
from minigpt4.runners.loop import TrainingLoop
from minigpt4.runners.plan import print_plan
from minigpt4.runners.run_checkpoints import RunCheckpoints
from minigpt4.runners.run_config import RunConfig, find_problems
from minigpt4.runners.run_folder import AUTO, Hold, new_folder, time_name
from minigpt4.runners.run_state import Position
from minigpt4.runners.validation import Validation, log_line

Batches = Iterator[dict[str, Any]]


@registry.register_runner("runner_base")
class RunnerBase(RunCheckpoints, TrainingLoop):
    """Trains or evaluates `model` on `datasets` ({name: {split: dataset}}) by `task`.

    `job_id` names the folder below `run.output_dir`, by default the time of the start; one that is taken
    gets a number. For another loop register a subclass with its own `train_epoch` as `run.runner`.
    """

    Config = RunConfig

    def __init__(
        self, cfg: WholeConfig, task: Any, model: Any, datasets: dict, job_id: str | None = None
    ) -> None:
        super().__init__(cfg, task, model)
        self.config, self.datasets = cfg, datasets
        self.job_id, self.validation = job_id, Validation(self)
        # where training begins, the checkpoint that says so, and its Progress for an exact resume
        self.max_epoch, self.start = self.run_cfg.max_epoch, Position(0, 0)
        self.resumed_from = self.resumed = None
        # what it writes, once it trains or evaluates
        self.output_dir = self.log = self.card = self.last_checkpoint = None
        self._hold = Hold()
        self._saved_step, self._is_ending = 0, False

    @classmethod
    def preflight(cls, cfg: RunConfig, where: str) -> list[Problem | str]:
        """Return the problems of the `run` section; nothing is loaded."""
        return find_problems(cfg, where)

    print_plan, launched = staticmethod(print_plan), staticmethod(launched)

    @classmethod
    def run(cls, cfg: WholeConfig) -> None:
        """Build everything that `cfg` names and train it. Raises ValueError or OSError for what is wrong then."""
        task = registry.get_task_class(cfg.run_cfg.task).setup_task(cfg=cfg)
        # each `begin` ends a phase of the start-up times in the log
        startup.begin("processes")
        with cls.launched(cfg) as job_id:
            startup.begin("datasets")
            datasets = task.build_datasets(cfg)
            startup.begin("model")
            model = task.build_model(cfg)
            startup.begin("optimizer")
            cls(cfg=cfg, task=task, model=model, datasets=datasets, job_id=job_id).train()

    def train(self, loader: Batches | None = None) -> dict[str, float] | None:
        """Train from the first or the resumed step to the last, or with `run.evaluate` return the losses.

        `loader`: an endless iterator of batches, with `run.iters_per_epoch` set; by default the datasets'.
        Raises ValueError or OSError for what is found wrong now: checkpoint, data, disk, another run in
        its folder, a loss of nan.
        """
        with self._hold:
            if self.run_cfg.resume_ckpt_path:
                self._load()
            if self.run_cfg.evaluate:
                return self.evaluate()
            self.validation.open()
            if self.start.epoch >= self.max_epoch:
                return self._nothing_left(loader)
            with self._opened(loader):
                self._train_epochs()

    @contextmanager
    def _opened(self, loader: Batches | None) -> Iterator[None]:
        """Open data, learning rate and output for the block, which signals, slow steps and missing data can end."""
        self._open_data(loader)
        schedule = registry.get_lr_scheduler_class(self.run_cfg.lr_sched)
        self.lr_scheduler = schedule(self.optimizer, self.run_cfg, self.iters_per_epoch)
        self._open_output()
        report.introduce(self)
        try:
            patience = data_watched(self.run_cfg.step_timeout_s, self.interruption)
            listening, watching = self.interruption.listening(), self.step_timeout.watching()
            with run_card.RunCard(self) as self.card, listening, watching, patience:
                yield
        finally:
            self.log.close()
            if loader is None:
                self.train_loader.close()

    def _train_epochs(self) -> None:
        begin, is_saved = time.time(), False
        samples_seen = self.resumed.samples_seen if self.resumed else 0
        for epoch in range(self.start.epoch, self.max_epoch):
            dist_utils.setup_seeds(self.run_cfg.seed, dist_utils.get_rank(), epoch)
            metrics = self._metrics(epoch, samples_seen)
            if epoch == self.start.epoch:
                self._catch_up(metrics)
            logging.info("Start training")
            logging.info(
                "Start training epoch %d, %d iters per inner epoch.", epoch, self.iters_per_epoch
            )
            means = self.train_epoch(epoch, metrics)
            samples_seen = metrics.samples_seen
            stats = {f"train_{name}": value for name, value in means.items()}
            is_saved = self._save(Position(epoch + 1, 0), metrics, stats)
            if epoch + 1 < self.max_epoch:
                self._end_if_told(Position(epoch + 1, 0), is_saved)
            self._end_epoch(Position(epoch + 1, 0), metrics, stats)
            dist_utils.barrier()
        report.sum_up(self, time.time() - begin, samples_seen)
        if not is_saved:
            raise OSError(
                f"the last epoch's checkpoint could not be written to '{self.output_dir}', see above"
            )

    def _metrics(self, epoch: int, samples_seen: int) -> MetricLogger:
        """Return the metrics of an epoch, of the first one as they were where the run resumes."""
        cfg, own = self.run_cfg, (self.device, self.log, samples_seen)
        metrics = MetricLogger(
            epoch, self.iters_per_epoch, cfg.log_freq, *own, cfg.max_skipped_updates
        )
        if epoch == self.start.epoch:
            with self._understood("progress"):
                state = self.resumed.restore(self) if self.resumed else metrics.state()
                metrics.resume(self.start.step, state)
        return metrics

    def _catch_up(self, metrics: MetricLogger) -> None:
        """Do what the run that is resumed exactly may not have come to behind its last checkpoint."""
        if stats := self.resumed.stats if self.resumed else None:
            is_same_folder = self.run_cfg.resume_ckpt_path == AUTO
            self._end_epoch(self.start, metrics, stats, in_log=is_same_folder)
        elif self.resumed and self.validation.is_due(self.start.step):
            self._validate(self.start, metrics)

    def after_step(
        self, epoch: int, metrics: MetricLogger, ranks_interrupted: torch.Tensor
    ) -> None:
        """Save and validate if it is time to, within an epoch; end the run if a rank was told to."""
        self._is_ending = self.interruption.agreed(ranks_interrupted)
        is_due = metrics.index - self._saved_step >= (self.run_cfg.save_every_iters or float("inf"))
        self.output_dir = self.log.folder = self._hold.followed(self.output_dir)
        if (is_due or self._is_ending) and metrics.index < self.iters_per_epoch:
            position = Position(epoch, metrics.index)
            self._end_if_told(position, self._save(position, metrics))
        if self.validation.is_due(metrics.index):
            self._validate(Position(epoch, metrics.index), metrics)

    def _end_if_told(self, position: Position, is_saved: bool) -> None:
        """End the run if a rank was told to; what rank 0 saved is what all ranks say."""
        if self._is_ending:
            path = self.last_checkpoint or self.resumed_from
            is_saved, path = from_main(lambda: (is_saved, path))
            raise self.interruption.ended(is_saved, path, *position)

    def _validate(
        self, position: Position, metrics: MetricLogger, stats: dict | None = None
    ) -> dict[str, float]:
        """Return the held-out losses before step `position`; the best so far is saved. Ends the run if told to."""
        if not self.validation.loaders:
            return {}
        losses = self.validation.at(position)
        if losses is None:
            self._is_ending = True
            self._end_if_told(position, self._save(position, metrics, stats))
        if self.validation.is_best(position):
            self._save(position, metrics, stats, best=True)
        return losses

    def _end_epoch(
        self, position: Position, metrics: MetricLogger, stats: dict, in_log: bool = True
    ) -> None:
        """Validate, and write the epoch's line of `log.txt` unless it is there."""
        losses = self._validate(position, metrics, stats)
        if in_log and not from_main(lambda: self.log.has_epoch(stats)):
            self.log.epoch(stats | losses)

    def _nothing_left(self, loader: Batches | None) -> None:
        if self.output_dir:  # it may have ended before its last words
            self._hold.lock(self.output_dir)
            self._open_data(loader)
            self.log = RunLog(self.output_dir)
            self._catch_up(self._metrics(self.start.epoch, self.resumed.samples_seen))
            report.print_skipped(self)
        main_print(
            f"Nothing left to train: '{self.resumed_from}' has finished epoch {self.start.epoch - 1} "
            f"and run.max_epoch is {self.max_epoch}; raise run.max_epoch to train on"
        )

    def evaluate(self) -> dict[str, float]:
        """Return losses of `valid_splits` and `test_splits`, as `log.txt` gets them, "<split>_loss" first."""
        begin = time.time()
        splits = [*self.run_cfg.valid_splits, *self.run_cfg.test_splits]
        loaders = self.task.build_eval_loaders(self.datasets, self.run_cfg, splits)
        self._open_output()
        with data_watched(self.run_cfg.step_timeout_s, self.interruption):
            losses = log_line(self.validation.measure(loaders))
        self.log.epoch(losses)
        main_print(f"Evaluation time {whole_seconds(time.time() - begin)}")
        return losses

    def _open_data(self, loader: Batches | None) -> None:
        """Set the train loader, resumed where the run was, and the length of an epoch."""
        seed = self.resumed.data_seed if self.resumed else None
        if seed is None:  # a resume that is not exact draws other data than came before
            seed = self.run_cfg.seed
            seed = seed if self.start == (0, 0) else derived_seed(seed, *filter(None, self.start))
        self.train_loader = loader or self.task.build_train_loader(
            self.datasets, self.run_cfg, seed
        )
        self.iters_per_epoch = self.run_cfg.iters_per_epoch or self.train_loader.epoch_length()
        if not self.resumed:
            if self.start.step >= self.iters_per_epoch:
                self.start = Position(self.start.epoch + 1, 0)
            return
        with self._understood("config' or 'progress"):
            self.resumed.check_settings(self)
            if data := self.resumed.mine["data"]:
                self.train_loader.resume(data)

    def _open_output(self) -> None:
        """Open the run's folder: a new one, or that of the checkpoint which `auto` found."""
        if not self.output_dir:
            root, name = expand_path(self.run_cfg.output_dir), self.job_id or time_name()
            self.output_dir = from_main(lambda: new_folder(root, name))
        self._hold.open(self.output_dir)
        self.job_id = self.output_dir.name
        self.log = RunLog(self.output_dir, trackers.open_trackers(self))
        self.log.config(self.config.to_dict())
