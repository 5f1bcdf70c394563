"""What a run says while it trains: lines of the 2023 shapes, and the numbers of each step."""

import logging
import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from minigpt4.common.device import peak_memory_mib
from minigpt4.common.dist_utils import (
    get_rank,
    get_world_size,
    is_main_process,
    main_print,
    sum_over_ranks,
)
from minigpt4.common.run_log import RunLog

_TIMER_WINDOW = 20  # iterations that `time` and `data` are means of


class NonFiniteLossError(ValueError):
    """Losses or gradients that are not finite, again and again; the message says where."""


def setup_logger() -> None:
    """Let rank 0 log from INFO on and the other ranks from WARNING on, to stderr."""
    level = logging.INFO if is_main_process() else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s [%(levelname)s] %(message)s", force=True)


def warn_once(about: object, message: str) -> None:
    """Log a warning unless it was logged for this object: scripts make what warns of a model again and again."""
    said = vars(about).setdefault("warnings_said", set())
    if message not in said:
        said.add(message)
        logging.warning(message)


def whole_seconds(seconds: float) -> str:
    """Return a duration as H:MM:SS."""
    return str(timedelta(seconds=int(seconds)))


def short_number(value: float) -> str:
    """Return a number of 0 or more in three digits: 0.52, 5.8, 61, 610, 12.3k."""
    if value >= 9999.5:
        return f"{value / 1000:.1f}k"
    return f"{value:.{2 - (value >= 1) - (value >= 9.95)}f}"


def batch_size(batch: dict[str, Any]) -> int:
    """Return the number of samples of a batch: each of its values has one entry a sample."""
    return len(next(iter(batch.values())))


@dataclass
class MetricLogger:
    """Losses, times and progress of one epoch of `num_steps` iterations.

    Losses stay on the device until a line is due, so that no step waits for the one before; on the
    CPU, where reading is free, they are read at every step. Updates that were skipped for numbers that
    are not finite are read with them, named and counted; `max_skipped` in a row end the run.
    `samples_seen` counts over all ranks and epochs: the caller hands it on.
    """

    epoch: int
    num_steps: int
    log_freq: int
    device: torch.device
    run_log: RunLog | None
    samples_seen: int = 0
    max_skipped: int = 1

    def __post_init__(self) -> None:
        self.losses, self.lr_sum = [], 0.0  # of the epoch so far
        self.index = self._first_index = self._num_unknown = (
            0  # to be made; first of this process; of unknown loss
        )
        self.skipped = self._in_a_row = 0
        self._unread, self._unread_updates = [], []  # until a line is due
        self._unwritten, self._last = [], {}  # records of steps; the last one that was written
        self._window = deque(maxlen=_TIMER_WINDOW)  # those that rates are of
        self._data_seconds = 0.0
        self._start = self._step_start = time.perf_counter()

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Time the block as `data`: waiting for the loader. A step begins here, behind what was saved or validated."""
        start = self._step_start = time.perf_counter()
        yield
        self._data_seconds = time.perf_counter() - start

    def state(self) -> dict[str, Any]:
        """Return what `resume` needs before the next step, be it the next epoch's. Raises NonFiniteLossError."""
        self._read()
        self._write()
        is_over = self.index == self.num_steps
        losses, lr_sum = ([], 0.0) if is_over else (list(self.losses), self.lr_sum)
        counts = {"samples_seen": self.samples_seen, "skipped": self.skipped}
        return {"losses": losses, "lr_sum": lr_sum, **counts, "in_a_row": self._in_a_row}

    def resume(self, index: int, state: dict[str, Any]) -> None:
        """Begin at step `index` of the epoch, with the `state()` of the run that came so far.

        Fewer losses than steps, as after other settings, are those of the end of `index` steps.
        """
        self.index = self._first_index = index
        self.losses, self.lr_sum = list(state["losses"]), state["lr_sum"]
        self._num_unknown, self.samples_seen = index - len(self.losses), state["samples_seen"]
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]

    def add(
        self, loss: torch.Tensor, lr: float, batch: dict[str, Any], num_tokens: int = 0
    ) -> None:
        """Take the loss (a scalar tensor, any device) and lr of the current step, and its batch.

        `num_tokens`: positions that the LLM read for it on this rank, text and image, without padding; 0 if unknown.
        """
        self.samples_seen += batch_size(batch) * get_world_size()
        self.lr_sum += lr
        self._unread.append((loss.detach().float(), batch.get("sample_id")))
        step = self.epoch * self.num_steps + self.index
        record = {"step": step, "epoch": self.epoch, "lr": lr, "samples": self.samples_seen}
        self._unwritten.append(
            record | {"batch_samples": batch_size(batch), "batch_tokens": num_tokens}
        )

    def updated(self, is_skipped: torch.Tensor) -> None:
        """Take whether the update was skipped on all ranks; after its last batch's `add`."""
        self._unread_updates.append((self.epoch * self.num_steps + self.index, is_skipped))

    def check(self) -> None:
        """Read what is due. Raises NonFiniteLossError, after the same step on all ranks."""
        if self._is_due() or self.device.type == "cpu":
            self._read()

    def _read(self) -> None:
        """Fetch the losses that are still on the device; name those that are not finite."""
        if not self._unread:
            return
        values, complaints = torch.stack([loss for loss, _ in self._unread]).tolist(), []
        self._sum_counts(self._unwritten[-len(values) :])
        first = self.epoch * self.num_steps + self._num_unknown + len(self.losses)
        for step, value in enumerate(values, start=first):
            if not math.isfinite(value):
                _, ids = self._unread[step - first]
                samples = f" (samples {', '.join(map(str, ids))})" if ids else ""
                complaint = f"step {step}: loss is {value} on rank {get_rank()}{samples}; optimizer not stepped"
                logging.warning("%s", complaint)
                complaints.append(complaint)
        self.losses += values
        self._unread.clear()
        self._judge_updates(complaints)

    def _sum_counts(self, records: list[dict[str, Any]]) -> None:
        """Make the samples and tokens of steps those of all ranks, which are all here; one message for all of them."""
        counts = [record["batch_samples"] for record in records] + [
            record["batch_tokens"] for record in records
        ]
        counts = list(map(int, sum_over_ranks(counts, self.device)))
        for record, samples, tokens in zip(records, counts, counts[len(records) :], strict=False):
            record |= {"batch_samples": samples, "batch_tokens": tokens}

    def _judge_updates(self, complaints: list[str]) -> None:
        """Count skipped updates, say so, and end the run after too many in a row."""
        flags = [is_skipped for _, is_skipped in self._unread_updates]
        flags = torch.stack(flags).tolist() if flags else []
        for (step, _), is_skipped in zip(self._unread_updates, flags, strict=True):
            self.skipped = self.skipped + is_skipped
            self._in_a_row = (self._in_a_row + 1) * is_skipped
            if not is_skipped:
                continue
            counted = f"{self._in_a_row} in a row"
            main_print(
                f"step {step}: update skipped on all ranks, {counted}, {self.skipped} so far"
            )
            if self._in_a_row >= self.max_skipped:
                reason = f"step {step}: a gradient is not finite; optimizer not stepped"
                raise NonFiniteLossError(
                    f"{complaints[-1] if complaints else reason}; {counted} (run.max_skipped_updates). "
                    "Try a smaller run.init_lr, run.max_grad_norm=1, or run.amp_dtype=bfloat16"
                )
        self._unread_updates.clear()

    def end_step(self) -> None:
        """Close the iteration: note its time, and print and write what is due."""
        before, self._step_start = self._step_start, time.perf_counter()
        self._unwritten[-1] |= {
            "seconds": self._step_start - before,
            "data_seconds": self._data_seconds,
        }
        if not self._unread:
            self._write()
            if self._is_due():
                main_print(self._progress(self._last))
        self.index += 1

    def _write(self) -> None:
        """Write the lines of `metrics.jsonl` whose losses have been read."""
        memory = round(peak_memory_mib(self.device))
        losses = self.losses[len(self.losses) - len(self._unwritten) :]
        for record, loss in zip(self._unwritten, losses, strict=True):
            # JSON knows no nan
            record |= {"loss": loss if math.isfinite(loss) else None, "memory_mib": memory}
            self._window.append(record)
            record |= self._rates()
            self._last = record
        self.run_log.steps(self._unwritten)
        self._unwritten = []

    def _rates(self) -> dict[str, float]:
        """Return throughput of all ranks, and the share of its time that this one waits for data, over the window."""
        rates = {
            "samples_per_s": "batch_samples",
            "tokens_per_s": "batch_tokens",
            "data_wait": "data_seconds",
        }
        seconds = self._window_sum("seconds")
        return {name: round(self._window_sum(key) / seconds, 4) for name, key in rates.items()}

    def _window_sum(self, key: str) -> float:
        return sum(record[key] for record in self._window)

    def end_epoch(self) -> dict[str, float]:
        """Print the epoch's total; return {"lr", "loss"}, means over its steps and all ranks."""
        seconds = time.perf_counter() - self._start
        per_step = seconds / max(self.index - self._first_index, 1)
        total = f"Total time: {whole_seconds(seconds)} ({per_step:.4f} s / it)"
        main_print(f"Train: data epoch: [{self.epoch}] {total}")
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        lr_sum, num_lr = sum_over_ranks([self.lr_sum, len(self.losses)], self.device)
        loss_sum, num_losses = sum_over_ranks([math.fsum(finite), len(finite)], self.device)
        stats = {"lr": lr_sum / num_lr, "loss": loss_sum / num_losses if num_losses else math.nan}
        logging.info("Averaged stats: lr: %.4f  loss: %.4f", stats["lr"], stats["loss"])
        return stats

    def _is_due(self) -> bool:
        return self.index % self.log_freq == 0 or self.index == self.num_steps - 1

    def _progress(self, record: dict[str, Any]) -> str:
        """Return the line of progress: the fields of 2023, as many as there were, then rates."""
        mean_time = (self._step_start - self._start) / (self.index + 1 - self._first_index)
        fields = [
            f"Train: data epoch: [{self.epoch}]",
            f"[{self.index:>{len(str(self.num_steps))}}/{self.num_steps}]",
            f"eta: {whole_seconds(mean_time * (self.num_steps - self.index))}",
            f"lr: {record['lr']:.6f}",
            f"loss: {self.losses[-1]:.4f}",
            f"time: {self._window_sum('seconds') / len(self._window):.4f}",
            f"data: {self._window_sum('data_seconds') / len(self._window):.4f}",
            f"max mem: {record['memory_mib']}",
            f"{short_number(record['samples_per_s'])} samples/s",
        ]
        if record["tokens_per_s"]:
            fields.append(f"{short_number(record['tokens_per_s'])} tok/s")
        return "  ".join([*fields, f"wait {record['data_wait']:.0%}"])
