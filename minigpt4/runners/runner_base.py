"""A run from start to end: processes, device, optimizer, epochs, checkpoints, resume, and what is said about it."""

import logging
import time
from collections import Counter
from contextlib import contextmanager

from minigpt4.common import dist_utils
from minigpt4.common.checkpoint import CheckpointError, load_checkpoint, load_optimizer, save_checkpoint
from minigpt4.common.device import build_scaler, explained_out_of_memory, resolve_device
from minigpt4.common.dist_utils import derived_seed, from_main, main_print
from minigpt4.common.logger import MetricLogger, RunLog, setup_logger, whole_seconds
from minigpt4.common.optims import build_optimizer
from minigpt4.common.registry import registry
from minigpt4.common.utils import expand_path
from minigpt4.runners.interruption import Interruption
from minigpt4.runners.plan import parts_table, print_plan
from minigpt4.runners.run_config import RunConfig, find_problems
from minigpt4.runners.run_folder import AUTO, checkpoint_name, new_folder, newest_checkpoint, prune
from minigpt4.runners.run_state import differences, progress, restore
from minigpt4.runners.step_timeout import StepWatch


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
        self.max_epoch, self.start_epoch, self.start_step = self.run_cfg.max_epoch, 0, 0
        self.output_dir = self.result_dir = self.last_checkpoint = self.resumed_from = None
        self._saved_step, self._is_ending = 0, False  # step of the epoch
        if not self.run_cfg.evaluate:
            self.optimizer = build_optimizer(self.model, self.run_cfg, self.device)
            self.scaler = build_scaler(self.model, self.run_cfg.amp, self.device)

    @classmethod
    def preflight(cls, cfg, where):
        """Return the problems of the `run` section, as lines; nothing is loaded."""
        return find_problems(cfg, where)

    print_plan = staticmethod(print_plan)

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
            with explained_out_of_memory(cfg.run_cfg):
                yield None
        except BaseException:
            dist_utils.leave_process_group(after_error=True)
            raise
        dist_utils.leave_process_group()

    def train(self, loader=None):
        """Train from the first or the resumed step to the last; a checkpoint and a line in `log.txt` after each epoch.

        `loader`: an endless iterator of batches, with `run.iters_per_epoch` set; None builds it from the datasets.
        Raises ValueError or OSError for what only now turns out to be wrong: checkpoint, data, disk, a loss of nan.
        """
        saved = self._load() if self.run_cfg.resume_ckpt_path else None
        if self.run_cfg.evaluate:
            return self.evaluate()
        eval_loaders = self.task.build_eval_loaders(self.datasets, self.run_cfg, self.run_cfg.valid_splits)
        if self.start_epoch >= self.max_epoch:
            return self._nothing_left(loader, saved, eval_loaders)
        self._build_loader(loader, saved)
        schedule = registry.get_lr_scheduler_class(self.run_cfg.lr_sched)
        self.lr_scheduler = schedule(self.optimizer, self.run_cfg, self.iters_per_epoch)
        self._open_output()
        self._introduce()
        self.interruption, self.watch = Interruption(), StepWatch(self.run_cfg.step_timeout_s)
        try:
            with self.interruption.listening(), self.watch.explaining():
                self._train_epochs(eval_loaders, saved)
        finally:
            self.watch.close()
            self.log.close()
            if loader is None:
                self.train_loader.close()

    def _build_loader(self, loader, saved):
        """Set the train loader, which goes on where `saved` stands, and the length of an epoch."""
        seed = self.run_cfg.seed  # 2023's checkpoints do not say which data came before: others are drawn, not again
        if saved and (data := saved["ranks"][0]["data"]):
            seed = data["seed"]
        elif self.start_epoch or self.start_step:
            seed = derived_seed(seed, *filter(None, (self.start_epoch, self.start_step)))
        self.train_loader = loader or self.task.build_train_loader(self.datasets, self.run_cfg, seed)
        self.iters_per_epoch = self.run_cfg.iters_per_epoch or self.train_loader.epoch_length()
        if saved:
            if lines := differences(saved, saved["config"], self):
                raise CheckpointError(
                    f"run.resume_ckpt_path: '{self.resumed_from}' is of a run with other settings and cannot go on "
                    "exactly:\n" + "\n".join(f"  {line}" for line in lines) + "\nStart it as it was; or, to take over "
                    "weights, optimizer and schedule and let the data begin anew, --options run.resume_mode=restart"
                )
            if data := saved["ranks"][dist_utils.get_rank()]["data"]:
                self.train_loader.resume(data)
        elif self.start_step >= self.iters_per_epoch:
            self.start_epoch, self.start_step = self.start_epoch + 1, 0

    def _train_epochs(self, eval_loaders, saved):
        start, is_saved = time.time(), False
        samples_seen = saved["ranks"][0]["metrics"]["samples_seen"] if saved else 0
        if saved and self.run_cfg.resume_ckpt_path == AUTO:
            self._end_epoch(saved["stats"], eval_loaders)
        for epoch in range(self.start_epoch, self.max_epoch):
            dist_utils.setup_seeds(self.run_cfg.seed, dist_utils.get_rank(), epoch)
            logging.info("Start training")
            logging.info("Start training epoch %d, %d iters per inner epoch.", epoch, self.iters_per_epoch)
            metrics = MetricLogger(
                epoch,
                self.iters_per_epoch,
                self.run_cfg.log_freq,
                self.device,
                self.log,
                samples_seen,
                self.run_cfg.max_skipped_updates,
            )
            if epoch == self.start_epoch:
                metrics.go_on(self.start_step, restore(self, saved) if saved else metrics.state())
            means = self.task.train_epoch(self, epoch, metrics)
            stats = {f"train_{name}": value for name, value in means.items()}
            samples_seen = metrics.samples_seen
            is_saved = self._save(epoch + 1, 0, metrics, stats)
            if epoch + 1 < self.max_epoch:
                self._end_if_told(epoch + 1, 0)
            self._end_epoch(stats, eval_loaders)
            dist_utils.barrier()
        self._sum_up(time.time() - start, samples_seen)
        if not is_saved:
            raise OSError(f"the last epoch's checkpoint could not be written to '{self.output_dir}', see above")

    def after_step(self, epoch, metrics, ranks_interrupted):
        """Save if it is time to; end the run if a rank was told to. The end of an epoch is saved by the runner.

        Contract: called by the task after the optimizer's step; no gradient is left over.
        """
        self._is_ending = self.interruption.agreed(ranks_interrupted)
        is_due = metrics.index - self._saved_step >= (self.run_cfg.save_every_iters or float("inf"))
        if (is_due or self._is_ending) and metrics.index < self.iters_per_epoch:
            self._save(epoch, metrics.index, metrics)
            self._end_if_told(epoch, metrics.index)

    def _end_if_told(self, epoch, step):
        if self._is_ending:
            raise self.interruption.ended(self.last_checkpoint, epoch, step)

    def _end_epoch(self, stats, eval_loaders):
        """Evaluate, and write the epoch's line of `log.txt` unless it is there."""
        if stats and not from_main(lambda: self.log.has_epoch(stats)):
            self.log.epoch(stats | self._split_losses(eval_loaders))

    def _nothing_left(self, loader, saved, eval_loaders):
        if self.output_dir:  # the run ended after its last checkpoint, but perhaps before its last words
            self._build_loader(loader, saved)
            self.log = RunLog(self.output_dir)
            self._end_epoch(saved["stats"], eval_loaders)
            self._print_skipped()
        main_print(
            f"Nothing left to train: '{self.resumed_from}' has finished epoch {self.start_epoch - 1} "
            f"and run.max_epoch is {self.max_epoch}; raise run.max_epoch to go on"
        )

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

    def _load(self):
        """Load weights, optimizer, scaler and position of `run.resume_ckpt_path`; to evaluate, only weights.

        Return what else is needed to go on exactly, None if the checkpoint or the user does not mean that.
        """
        where, path = "run.resume_ckpt_path", self.run_cfg.resume_ckpt_path
        if path == AUTO:
            root = expand_path(self.run_cfg.output_dir)
            path = from_main(lambda: newest_checkpoint(root))
            if path is None:
                return logging.info("No checkpoint below %s: starting from the beginning", root)
        state, self.resumed_from = load_checkpoint(path, where, whole=True)
        self.model.load_trainable(state["model"], where, path=self.resumed_from)
        if not self.run_cfg.evaluate:
            load_optimizer(self.optimizer, state["optimizer"], where)
            if self.scaler.is_enabled() and state["scaler"]:  # None or {}: written by a run without one
                self.scaler.load_state_dict(state["scaler"])
            position = state["progress"]["position"] if "progress" in state else {"epoch": int(state["epoch"]) + 1}
            self.start_epoch, self.start_step = position["epoch"], position.get("step", 0)
            self._saved_step = self.start_step
        logging.info("Resume checkpoint from %s", self.resumed_from)
        if self.run_cfg.evaluate or "progress" not in state or self.run_cfg.resume_mode != "exact":
            return None
        if self.run_cfg.resume_ckpt_path == AUTO:
            self.output_dir = self.resumed_from.parent
        return state["progress"] | {"config": state["config"]}

    def _open_output(self):
        """Open the run's folder: a new one, or that of the checkpoint which `auto` found."""
        if not self.output_dir:
            root = expand_path(self.run_cfg.output_dir)
            self.output_dir = from_main(lambda: new_folder(root, self.job_id or time.strftime("%Y%m%d%H%M")))
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

    def _save(self, epoch, step, metrics, stats=None):
        """Write a checkpoint of the run before step (epoch, step) from rank 0; return whether it is there."""
        self._saved_step = step
        so_far = progress(self, epoch, step, metrics.state(), stats)  # from all ranks
        if not dist_utils.is_main_process():
            return True
        path = self.output_dir / (checkpoint_name(epoch, step) if step else checkpoint_name(epoch - 1))
        logging.info(
            "Saving checkpoint at epoch %d%s to %s.", *((epoch, f", step {step}") if step else (epoch - 1, "")), path
        )
        state = {
            "model": self.model.trainable_state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "config": self.config.to_dict(),
            "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
            "epoch": epoch - 1,
            "progress": so_far,
        }
        is_saved = save_checkpoint(path, state)
        if is_saved:
            self.last_checkpoint = path
            prune(self.output_dir, self.run_cfg.keep_last_k)
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
        self._print_skipped()
        if self.last_checkpoint:
            main_print(f"Checkpoint: {self.last_checkpoint}")
            main_print(f"Next: use these weights by --options model.ckpt={self.last_checkpoint}")

    def _print_skipped(self):
        """Print how many samples of each dataset were skipped, by reason, on all ranks."""
        for name, counts in getattr(self.train_loader, "skip_report", dict)().items():
            total = sum(map(Counter, dist_utils.gather_from_ranks(counts)), Counter())
            met, held_out = total.pop("seen", 0), total.pop("held_out", 0)
            reasons = ", ".join(f"{count} {reason}" for reason, count in total.items())
            held = f"; {held_out} left to val" if held_out else ""
            main_print(f"{name}: {total.total()} of {met} samples skipped{f' ({reasons})' if reasons else ''}{held}")
