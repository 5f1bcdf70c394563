"""Validation while a run trains: when it is due, what it writes and says, which step was the best.

Its losses go to `metrics.jsonl`, a JSON line a split, answers to fixed samples to `samples.html`. Contract with the
runner: a step is saved, if that is due, before it is validated, and a run that resumes validates first where it
stands, if that is due there and `metrics.jsonl` does not say how it went. So a run may be killed at any time, and no
validation is lost or done twice.
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

Record = dict[str, Any]  # what metrics.jsonl says of a split at a step


class Validation:
    """The held-out splits of a run; `best` is {"metric", "value", "step"} of the best validation so far, if any."""

    def __init__(self, run: "RunnerBase") -> None:
        self.run, self.loaders = run, {}
        self.best = self._page = None

    def open(self) -> None:
        """Build the loaders of `run.valid_splits`. Raises ValueError for one that no dataset has."""
        cfg = self.run.run_cfg
        self.loaders = self.run.task.build_eval_loaders(self.run.datasets, cfg, cfg.valid_splits)

    def is_due(self, step: int) -> bool:
        """Return whether it is due after `step` steps of an epoch, where an update ends, which is not its end."""
        every, accum = self.run.run_cfg.eval_every_iters, self.run.run_cfg.accum_grad_iters
        if every is None or not 0 < step < self.run.iters_per_epoch:
            return False
        return step // every > max(step - accum, 0) // every

    def at(self, position: Position) -> dict[str, float] | None:
        """Validate before step `position`, unless it is recorded; return what `log.txt` says of it.

        Called by all ranks. None: a rank was told to end, and nothing was written.
        """
        step = position.epoch * self.run.iters_per_epoch + position.step
        path = self.run.log.folder / "metrics.jsonl"
        records = from_main(lambda: recorded(path, step))
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
        self._judge(step, losses)
        return losses

    def measure(self, loaders: dict[str, list], step: int = 0) -> dict[str, Record] | None:
        """Return {split: record}; None if a rank was told to end. Training's random state and mode stay."""
        run, records = self.run, {}
        is_training = run.model.training
        with random_state_kept(run.device):
            for split, of_split in loaders.items():
                setup_seeds(run.run_cfg.seed)  # always the same, on all ranks
                begin = time.perf_counter()
                found = run.task.held_out(
                    run.model, of_split, run.device, lambda: run.interruption.signal is not None
                )
                if found is None:
                    break
                say(split, found)
                records[split] = as_record(split, step, found, time.perf_counter() - begin)
                records[split]["epoch"] = max(step - 1, 0) // (run.iters_per_epoch or 1)
        run.model.train(is_training)
        return records if records.keys() == loaders.keys() else None

    def _add_samples(self, step: int, records: dict[str, Record]) -> None:
        """Let rank 0 answer the fixed samples of the first split; the others wait in no training step meanwhile."""
        from_main(lambda: self._write_samples(step, records))

    def _write_samples(self, step: int, records: dict[str, Record]) -> None:
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
        except Exception as error:  # of a dataset or model of any kind: no reason to end the run
            named = f"{type(error).__name__}: {error}"
            logging.warning(
                "samples.html: not written at step %d (%s); training goes on", step, named
            )
        finally:
            run.model.train(is_training)

    def _judge(self, step: int, losses: dict[str, float]) -> None:
        """Note the step as the best, if it is."""
        metric = self.run.run_cfg.best_metric or next(iter(best_metrics(self.run.run_cfg)))
        value = value_of(metric, losses)
        if value is None:
            return
        before = self.best if self.best and self.best["metric"] == metric else None
        is_better = before is None or (
            value > before["value"] if metric.endswith("_gap") else value < before["value"]
        )
        if is_better or before["step"] == step:
            self.best = {"metric": metric, "value": value, "step": step}

    def is_best(self, position: Position) -> bool:
        """Return whether the best validation so far is that before step `position`."""
        step = position.epoch * self.run.iters_per_epoch + position.step
        return self.best is not None and self.best["step"] == step


def value_of(metric: str, losses: dict[str, float]) -> float | None:
    """Return one of `run_config.best_metrics` of what `log_line` gives; None where it is not known or no number."""
    value = losses.get(metric)
    if metric.endswith("_wrong_gap"):
        wrong, right = (
            losses.get(metric.replace("_gap", "_loss")),
            losses.get(metric.replace("_wrong_gap", "_loss")),
        )
        value = None if wrong is None or right is None else wrong - right
    return value if value is not None and math.isfinite(value) else None


def as_record(split: str, step: int, found: Any, seconds: float) -> Record:
    """Return a HeldOut as it is written; JSON knows no nan."""
    record = {
        "validation": split,
        "step": step,
        "epoch": None,
        "loss": found.loss,
        "blank_loss": found.blank_loss,
    }
    record |= {
        "wrong_loss": found.wrong_loss,
        "items": found.num_items,
        "samples": found.num_samples,
    }
    record |= {
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
    """Return {split: record} of the validation at `step` that a metrics.jsonl has."""
    found = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        if '"validation"' not in line:
            continue
        try:
            record = json.loads(line)
        except ValueError:  # of a run that was killed within the line
            continue
        if record.get("step") == step:
            found[record["validation"]] = record
    return found


def log_line(records: dict[str, Record]) -> dict[str, float]:
    """Return what log.txt says of a validation: losses, then those of the controls that there are."""
    losses = {}
    for split, record in records.items():
        losses[f"{split}_loss"] = math.nan if record["loss"] is None else record["loss"]
    for split, record in records.items():
        for control in ("blank_loss", "wrong_loss"):
            if record[control] is not None:
                losses[f"{split}_{control}"] = record[control]
    return losses


def say(split: str, found: Any) -> None:
    """Log the losses of a split, and a warning if the images do not help."""
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
