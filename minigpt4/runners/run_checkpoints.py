"""The checkpoints of a run: the one that it resumes from, and those that it writes."""

import logging
from contextlib import AbstractContextManager

from minigpt4.common.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_optimizer,
    save_checkpoint,
    understood,
)
from minigpt4.common.dist_utils import from_main
from minigpt4.common.logger import MetricLogger
from minigpt4.common.utils import expand_path
from minigpt4.models.trained_with import check_identity
from minigpt4.runners.run_folder import AUTO, BEST, checkpoint_name, newest_checkpoint, prune
from minigpt4.runners.run_state import Position, Progress


class RunCheckpoints:
    """The part of RunnerBase that reads and writes checkpoints."""

    def _load(self) -> None:
        """Load `run.resume_ckpt_path`: to evaluate only the weights, to train also optimizer, scaler and position."""
        where, path = "run.resume_ckpt_path", self.run_cfg.resume_ckpt_path
        if is_auto := path == AUTO:
            root = expand_path(self.run_cfg.output_dir)
            if not self.run_cfg.evaluate:
                self._hold.lock(root)  # no other run starts here until this one has its folder
            path = from_main(lambda: newest_checkpoint(root))
            if path is None and self.run_cfg.evaluate:
                raise CheckpointError(
                    f"{where}: no checkpoint below '{root}' to evaluate; name its path, or the run.output_dir of its run"
                )
            if path is None:
                logging.info("No checkpoint below %s: starting from the beginning", root)
                return
        state, self.resumed_from = load_checkpoint(path, where, whole=True)
        logging.info("Resume checkpoint from %s", self.resumed_from)
        # the five keys of 2023, which every checkpoint has
        check_identity(state, self.resumed_from, where, self.model.identity())
        with self._understood("model"):
            self.model.load_trainable(state["model"], where, path=self.resumed_from)
        if self.run_cfg.evaluate:
            return
        with self._understood("optimizer"):
            load_optimizer(self.optimizer, state["optimizer"], where)
        with self._understood("scaler"):
            # None or {}: the run that wrote it had no scaler
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
        # what an exact resume needs; a checkpoint without it is of the end of an epoch
        with self._understood("progress"):
            progress = Progress.of_checkpoint(state)
        with self._understood("epoch"):
            self.start = progress.position if progress else Position.after_epoch(state["epoch"])
        self._saved_step = self.start.step
        if progress and self.run_cfg.resume_mode == "exact":
            self.resumed, self.validation.best = progress, progress.best
            if is_auto:
                self.output_dir = self.resumed_from.parent

    def _understood(self, key: str) -> AbstractContextManager:
        """Within the block, an error is a CheckpointError that names `key` of the resumed checkpoint."""
        return understood(key, "run.resume_ckpt_path", self.resumed_from)

    def _save(
        self,
        position: Position,
        metrics: MetricLogger,
        stats: dict | None = None,
        best: bool = False,
    ) -> bool:
        """Write a checkpoint before step `position`, with `best` as the best one; return whether it worked.

        Called by all ranks. All wait for rank 0, which writes it: in the next step they would take it for late.
        """
        self._saved_step = self._saved_step if best else position.step
        progress = Progress.of_run(self, position, metrics.state(), stats)
        return from_main(lambda: self._write(progress, best))

    def _write(self, progress: Progress, best: bool) -> bool:
        """Write the checkpoint of a progress; return whether it worked."""
        epoch, step = progress.position
        # an epoch's end is named by the epoch that is over
        done = (epoch, step) if step else (epoch - 1,)
        path = self.output_dir / (BEST if best else checkpoint_name(*done))
        logging.info("Saving checkpoint at epoch %s to %s.", ", step ".join(map(str, done)), path)
        state = {
            "model": self.model.trainable_state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "config": self.config.to_dict(),
            "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
            "epoch": epoch - 1,
            "progress": progress.to_plain(),
        }
        is_saved = save_checkpoint(path, state)
        if is_saved and not best:
            self.last_checkpoint = path
            prune(self.output_dir, self.run_cfg.keep_last_k)
        return is_saved
