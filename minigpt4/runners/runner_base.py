"""The runner: a run from start to end, with its processes, data, epochs, checkpoints, resume and evaluation."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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

    `job_id` names the run's folder below `run.output_dir`, by default the start time; a taken name gets a
    number appended. For another training loop, register a subclass with its own `train_epoch` as `run.runner`.
    """

    Config = RunConfig

    def __init__(
        self, cfg: WholeConfig, task: Any, model: Any, datasets: dict, job_id: str | None = None
    ) -> None:
        super().__init__(cfg, task, model)
        self.config, self.datasets = cfg, datasets
        self.job_id, self.validation = job_id, Validation(self)
        # where training begins; when resuming, the checkpoint's path and, if exact, its Progress
        self.max_epoch, self.start = self.run_cfg.max_epoch, Position(0, 0)
        self.resumed_from = self.resumed = None
        # output, opened when training or evaluation begins
        self.output_dir = self.log = self.card = self.last_checkpoint = None
        self.metrics = None  # of the current epoch
        self._hold = Hold()
        self._saved_step, self._is_ending = 0, False

    @classmethod
    def preflight(cls, cfg: RunConfig, where: str) -> list[Problem | str]:
        """Return the problems of the `run` section; nothing is loaded."""
        return find_problems(cfg, where)

    print_plan, launched = staticmethod(print_plan), staticmethod(launched)

    @classmethod
    def run(cls, cfg: WholeConfig) -> None:
        """Build everything that `cfg` names and train it. Raises ValueError or OSError for what cannot be used."""
        task = registry.get_task_class(cfg.run_cfg.task).setup_task(cfg=cfg)
        # each `begin` starts the next phase of the start-up times in the log
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

        `loader`: an endless iterator of batches, which needs `run.iters_per_epoch`; by default one over the datasets.
        Raises ValueError or OSError: a bad checkpoint or data, a full disk, another run in its folder, a loss that stays nan.
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
        """Open data, schedule and output for the block, and write its record."""
        self._open_data(loader)
        schedule = registry.get_lr_scheduler_class(self.run_cfg.lr_sched)
        self.lr_scheduler = schedule(self.optimizer, self.run_cfg, self.iters_per_epoch)
        self._open_output()
        report.introduce(self)
        with self._recorded(loader):
            yield

    @contextmanager
    def _recorded(self, loader: Batches | None) -> Iterator[None]:
        """Write the run card of the block, and close log and data. Signals, late ranks and missing batches end the block."""
        try:
            watching_data = data_watched(self.run_cfg.step_timeout_s, self.interruption)
            listening, watching_ranks = self.interruption.listening(), self.step_timeout.watching()
            with run_card.RunCard(self) as self.card, listening, watching_ranks, watching_data:
                yield
        finally:
            self.log.close()
            if loader is None:
                self.train_loader.close()

    def _train_epochs(self) -> None:
        """Train and validate the epochs that are left. Raises OSError if the last checkpoint cannot be written."""
        begin, is_saved = time.time(), False
        samples_seen = self.resumed.samples_seen if self.resumed else 0
        for epoch in range(self.start.epoch, self.max_epoch):
            # seeds first: the metrics of a resumed epoch restore its random state
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
            # save before validation, so that a killed run loses neither
            stats = {f"train_{name}": value for name, value in means.items()}
            next_epoch = Position(epoch + 1, 0)
            is_saved = self._save(next_epoch, metrics, stats)
            self._is_ending |= self.interruption.agreed_by_all()
            if next_epoch.epoch < self.max_epoch:
                self._end_if_told(next_epoch, is_saved)
            self._end_epoch(next_epoch, metrics, stats)
            dist_utils.barrier()
        report.sum_up(self, time.time() - begin, samples_seen)
        if not is_saved:
            raise OSError(
                f"the last epoch's checkpoint could not be written to '{self.output_dir}', see above"
            )

    def _metrics(self, epoch: int, samples_seen: int) -> MetricLogger:
        """Return the metrics of an epoch; for the first one, resume them and the run's state where it starts."""
        cfg, own = self.run_cfg, (self.device, self.log, samples_seen)
        metrics = MetricLogger(
            epoch, self.iters_per_epoch, cfg.log_freq, *own, cfg.max_skipped_updates
        )
        if epoch == self.start.epoch:
            with self._understood("progress"):
                state = self.resumed.restore(self) if self.resumed else metrics.state()
                metrics.resume(self.start.step, state)
        self.metrics = metrics
        return metrics

    @property
    def steps_done(self) -> int:
        """How many steps the run has trained, over all its epochs and processes."""
        metrics = self.metrics
        epoch, step = (metrics.epoch, metrics.index) if metrics else self.start
        return epoch * self.iters_per_epoch + step

    def _catch_up(self, metrics: MetricLogger) -> None:
        """Do what an exactly resumed run may have missed after its last checkpoint: validation, the epoch's log line."""
        if not self.resumed:
            return
        if self.resumed.stats:  # the checkpoint is of the end of an epoch
            stats, is_same_folder = self.resumed.stats, self.run_cfg.resume_ckpt_path == AUTO
            is_missing = is_same_folder and not from_main(lambda: self.log.has_epoch(stats))
            self._end_epoch(self.start, metrics, stats, in_log=is_missing)
        elif self.validation.is_due(self.start.step):
            self._validate(self.start, metrics)

    def after_step(
        self, epoch: int, metrics: MetricLogger, ranks_interrupted: torch.Tensor
    ) -> None:
        """Save and validate if due within an epoch; end the run if a rank was told to."""
        self._is_ending = self.interruption.agreed(ranks_interrupted)
        save_every = self.run_cfg.save_every_iters or float("inf")
        is_save_due = metrics.index - self._saved_step >= save_every
        self.output_dir = self.log.folder = self._hold.followed(self.output_dir)
        if (is_save_due or self._is_ending) and metrics.index < self.iters_per_epoch:
            position = Position(epoch, metrics.index)
            self._end_if_told(position, self._save(position, metrics))
        if self.validation.is_due(metrics.index):
            self._validate(Position(epoch, metrics.index), metrics)

    def _end_if_told(self, position: Position, is_saved: bool) -> None:
        """Raise Interrupted if a rank was told to end; all ranks report the checkpoint that rank 0 wrote."""
        if self._is_ending:
            path = from_main(lambda: self.last_checkpoint or self.resumed_from)
            raise self.interruption.ended(is_saved, path, *position)

    def _validate(
        self, position: Position, metrics: MetricLogger, stats: dict | None = None
    ) -> dict[str, float]:
        """Return the held-out losses before step `position`; save the best so far. Ends the run if told to."""
        if not self.validation.loaders:
            return {}
        best_saved = self.validation.best
        metrics.state()  # writes the records of the steps before
        losses = self.validation.at(position)
        if losses is None:
            self._is_ending = True
            self._end_if_told(position, self._save(position, metrics, stats))
        is_best = self.validation.is_best(position)
        if is_best and not self._save(position, metrics, stats, best=True):
            self.validation.best = best_saved
        return losses

    def _end_epoch(
        self, position: Position, metrics: MetricLogger, stats: dict, in_log: bool = True
    ) -> None:
        """Validate; with `in_log` write the epoch's line of `log.txt`."""
        losses = self._validate(position, metrics, stats)
        if in_log:
            self.log.epoch(stats | losses)

    def _nothing_left(self, loader: Batches | None) -> None:
        """Say that the resumed run is complete, after what it may have missed when it ended."""
        if self.output_dir:
            self._hold.open(self.output_dir)
            self._open_data(loader)
            card = from_main(lambda: run_card.earlier_card(self.output_dir))
            is_over = run_card.is_final(card, self.resumed_from)
            self.log = RunLog(self.output_dir, None if is_over else trackers.open_trackers(self))
            with nullcontext() if is_over else self._recorded(loader):
                self._catch_up(self._metrics(self.start.epoch, self.resumed.samples_seen))
                report.print_skipped(self)
        main_print(
            f"Nothing left to train: '{self.resumed_from}' has finished epoch {self.start.epoch - 1} "
            f"and run.max_epoch is {self.max_epoch}; raise run.max_epoch to train on"
        )

    def evaluate(self) -> dict[str, float]:
        """Return the losses of `valid_splits` and `test_splits` as in `log.txt`: every "<split>_loss", then the controls."""
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
        """Set the train loader, at the position of a resume, and the length of an epoch."""
        seed = self.resumed.data_seed if self.resumed else None
        if seed is None:
            seed = self.run_cfg.seed
            if self.start != (0, 0):  # a resume that is not exact draws other data than before
                seed = derived_seed(seed, *filter(None, self.start))
        self.train_loader = loader or self.task.build_train_loader(
            self.datasets, self.run_cfg, seed
        )
        self.iters_per_epoch = self.run_cfg.iters_per_epoch or self.train_loader.epoch_length()
        if not self.resumed:
            if self.start.step >= self.iters_per_epoch:  # an epoch may be shorter than before
                self.start, self._saved_step = Position(self.start.epoch + 1, 0), 0
            return
        with self._understood("config' or 'progress"):
            self.resumed.check_settings(self)
            if data := self.resumed.mine["data"]:
                self.train_loader.resume(data)

    def _open_output(self) -> None:
        """Open the run's folder, a new one or that of the checkpoint that `auto` found, its log and a training's trackers."""
        if not self.output_dir:
            root, name = expand_path(self.run_cfg.output_dir), self.job_id or time_name()
            self.output_dir = from_main(lambda: new_folder(root, name))
        self._hold.open(self.output_dir)
        self.job_id = self.output_dir.name
        is_training = not self.run_cfg.evaluate
        self.log = RunLog(self.output_dir, trackers.open_trackers(self) if is_training else None)
        self.log.config(self.config.to_dict())
