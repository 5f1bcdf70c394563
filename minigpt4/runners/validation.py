"""Validation during training: when it is due, its losses and sample answers, and the best step so far.

Its losses go to `metrics.jsonl`, one JSON line a split; answers to fixed samples go to `samples.html`. Contract with
the runner: a step is saved, if due, before it is validated, and a resumed run first validates the step from which it
resumes, if that is due and not yet in `metrics.jsonl`. So a run may be killed at any time, and no validation is lost;
only those of steps that are trained again are measured again.
"""

import json
import logging
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4.common.dist_utils import from_main, setup_seeds
from minigpt4.models.llm.sharding import is_sharded
from minigpt4.runners.run_config import best_metrics
from minigpt4.runners.run_state import Position, random_state_kept

if TYPE_CHECKING:
    from minigpt4.runners.runner_base import RunnerBase

Record = dict[str, Any]  # the line of metrics.jsonl for one split at one step


class Validation:
    """The held-out splits of a run; `best` is {"metric", "value", "step"} of the best validation so far, if any."""

    def __init__(self, run: "RunnerBase") -> None:
        self.run, self.loaders = run, {}
        self.best = self._page = None

    def open(self) -> None:
        """Build the loaders of `run.valid_splits`. Raises ValueError for a split that no dataset has."""
        cfg = self.run.run_cfg
        self.loaders = self.run.task.build_eval_loaders(self.run.datasets, cfg, cfg.valid_splits)

    def is_due(self, step: int) -> bool:
        """Return whether validation is due after `step` steps of an epoch, an update's last; never at the epoch's end."""
        every, accum = self.run.run_cfg.eval_every_iters, self.run.run_cfg.accum_grad_iters
        if every is None or not 0 < step < self.run.iters_per_epoch:
            return False
        # whether a multiple of `every` lies within the steps of this update
        return step // every > max(step - accum, 0) // every

    def at(self, position: Position) -> dict[str, float] | None:
        """Validate before step `position`, unless recorded by the resumed run; return the losses for `log.txt`.

        Called by all ranks. Return None, and write nothing, if a rank was told to end.
        """
        step = position.epoch * self.run.iters_per_epoch + position.step
        path = self.run.log.folder / "metrics.jsonl"
        is_recorded = position == self.run.start and self.run.resumed.validates_alike(self.run)
        records = from_main(lambda: recorded(path, step)) if is_recorded else {}
        if not self.loaders.keys() <= records.keys():
            measured = self.measure(self.loaders, step)
            if measured is None:
                return None
            self._add_samples(step, measured)
            for split, record in measured.items():
                if split not in records:
                    self.run.log.validation(record)
            records = measured
        losses = log_line({split: records[split] for split in self.loaders})
        self._update_best(step, losses)
        return losses

    def measure(self, loaders: dict[str, list], step: int = 0) -> dict[str, Record] | None:
        """Return {split: record}; None if a rank was told to end. Restores the random state and the model's mode."""
        run, records = self.run, {}
        is_training = run.model.training
        with random_state_kept(run.device):
            for split, split_loaders in loaders.items():
                setup_seeds(run.run_cfg.seed)  # the same at every validation and on all ranks
                begin = time.perf_counter()
                held_out = run.task.held_out(
                    run.model,
                    split_loaders,
                    run.device,
                    lambda: run.interruption.signal is not None,
                )
                if held_out is None:
                    break
                say(split, held_out)
                records[split] = as_record(split, step, held_out, time.perf_counter() - begin)
                # the epoch of the last step that was trained
                records[split]["epoch"] = max(step - 1, 0) // (run.iters_per_epoch or 1)
        run.model.train(is_training)
        return records if records.keys() == loaders.keys() else None

    def _add_samples(self, step: int, records: dict[str, Record]) -> None:
        """Let rank 0 answer the fixed samples of the first split; the others wait here, not in a timed training step."""
        from_main(lambda: self._write_samples(step, records))

    def _write_samples(self, step: int, records: dict[str, Record]) -> None:
        """Add the answers at `step` to `samples.html`, if the model can answer; an error is only a warning."""
        from minigpt4.conversation.sample_answers import can_answer
        from minigpt4.evaluation.samples import SamplesPage

        run, number = self.run, self.run.run_cfg.eval_samples
        if not number or not can_answer(run.model):
            return
        if is_sharded(run.model):
            logging.info(
                "samples.html: not written, every token of an answer would gather the LLM (run.shard_llm)"
            )
            return
        split, loaders = next(iter(self.loaders.items()))
        is_training = run.model.training
        run.model.eval()
        try:
            with random_state_kept(run.device):
                setup_seeds(run.run_cfg.seed)
                self._page = self._page or SamplesPage(loaders[0].source, number)
                where = {
                    "step": step,
                    "epoch": records[split]["epoch"],
                    "loss": records[split]["loss"],
                }
                self._page.add(run.model, run.log.folder, **where)
        except Exception as error:  # any dataset's or model's own error must not end the run
            named = f"{type(error).__name__}: {error}"
            logging.warning(
                "samples.html: not written at step %d (%s); training goes on", step, named
            )
        finally:
            run.model.train(is_training)

    def _update_best(self, step: int, losses: dict[str, float]) -> None:
        """Make this step the best, unless another step is at least as good by the same metric."""
        metric = self.run.run_cfg.best_metric or best_metrics(self.run.run_cfg)[0]
        value = value_of(metric, losses)
        if value is None:
            return
        best = self.best
        if best and best["metric"] == metric and best["step"] != step:
            is_gap = metric.endswith("_gap")  # a gap is better when larger, a loss when smaller
            is_better = value > best["value"] if is_gap else value < best["value"]
            if not is_better:
                return
        self.best = {"metric": metric, "value": value, "step": step}

    def is_best(self, position: Position) -> bool:
        """Return whether the validation before step `position` is the best so far."""
        step = position.epoch * self.run.iters_per_epoch + position.step
        return self.best is not None and self.best["step"] == step


def value_of(metric: str, losses: dict[str, float]) -> float | None:
    """Return a metric of `run_config.best_metrics` from the losses of `log_line`; None if unknown or not finite."""
    value = losses.get(metric)
    if metric.endswith("_wrong_gap"):
        right = losses.get(metric.replace("_wrong_gap", "_loss"))
        wrong = losses.get(metric.replace("_gap", "_loss"))
        value = None if wrong is None or right is None else wrong - right
    return value if value is not None and math.isfinite(value) else None


def as_record(split: str, step: int, found: Any, seconds: float) -> Record:
    """Return a HeldOut as its line of `metrics.jsonl`; numbers that are not finite, which JSON lacks, become None."""
    record = {
        "validation": split,
        "step": step,
        "epoch": None,
        "loss": found.loss,
        "blank_loss": found.blank_loss,
        "wrong_loss": found.wrong_loss,
        "items": found.num_items,
        "samples": found.num_samples,
        "gain": found.gain,
        "gain_error": found.error,
        "uses_image": found.uses_image,
        "seconds": seconds,
    }
    for key, value in record.items():
        if isinstance(value, float) and not math.isfinite(value):
            record[key] = None
    return record


def recorded(path: Path, step: int) -> dict[str, Record]:
    """Return {split: record} of the validation at `step` that is in a metrics.jsonl."""
    found = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        if '"validation"' not in line:
            continue
        try:
            record = json.loads(line)
        except ValueError:  # the run was killed while it wrote the line
            continue
        if record.get("step") == step:
            found[record["validation"]] = record
    return found


def log_line(records: dict[str, Record]) -> dict[str, float]:
    """Return the numbers of a validation for log.txt: the loss of every split, then the measured controls."""
    losses = {}
    for split, record in records.items():
        losses[f"{split}_loss"] = math.nan if record["loss"] is None else record["loss"]
    for split, record in records.items():
        for control in ("blank_loss", "wrong_loss"):
            if record[control] is not None:
                losses[f"{split}_{control}"] = record[control]
    return losses


def say(split: str, found: Any) -> None:
    """Log the losses of a split, and a warning if the model does not use the images."""
    losses = f"loss {found.loss:.4f}"
    if found.wrong_loss is not None:
        losses += (
            f", with blank images {found.blank_loss:.4f}, with wrong images {found.wrong_loss:.4f}"
        )
    logging.info("Evaluation on %s: %s", split, losses)
    if found.uses_image is False:
        logging.warning(
            f"{split}: the model does not use the image: per token, a sample's loss is {found.gain:.4f} lower with its "
            f"own image than with a wrong one, standard error {found.error:.4f}, {found.num_pairs} samples ({losses}). "
            "That is usual at the start of training; if it stays, look whether images and texts belong together: "
            "python -m minigpt4.datasets.inspect"
        )
