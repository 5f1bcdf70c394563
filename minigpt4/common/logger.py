"""Logging of a run: progress lines in the format of the 2023 release, and the metrics of each step."""

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
    is_main_process,
    main_print,
    sum_over_ranks,
)
from minigpt4.common.run_log import RunLog

_TIMER_WINDOW = 20  # steps over which times and rates are averaged


class NonFiniteLossError(ValueError):
    """Too many updates in a row had a loss or gradient that is not finite; the message says where."""


def setup_logger() -> None:
    """Log to stderr: rank 0 from level INFO, the other ranks from WARNING."""
    level = logging.INFO if is_main_process() else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s [%(levelname)s] %(message)s", force=True)


def warn_once(about: object, message: str) -> None:
    """Log a warning once for each object `about`, such as a model that a script wraps again and again."""
    logged = vars(about).setdefault("warnings_said", set())
    if message not in logged:
        logged.add(message)
        logging.warning(message)


def whole_seconds(seconds: float) -> str:
    """Return a duration as H:MM:SS."""
    return str(timedelta(seconds=int(seconds)))


def short_number(value: float) -> str:
    """Return a number of 0 or more in two or three significant digits: 0.52, 5.8, 61, 610, 12.3k."""
    if value >= 9999.5:
        return f"{value / 1000:.1f}k"
    decimals = 2 - (value >= 1) - (value >= 9.95)
    return f"{value:.{decimals}f}"


def batch_size(batch: dict[str, Any]) -> int:
    """Return the number of samples of a batch, whose values have one entry a sample."""
    return len(next(iter(batch.values())))


@dataclass
class MetricLogger:
    """Losses, times and progress of one epoch of `num_steps` steps.

    Losses stay on the device until a progress line is due, so that no step waits for the one before;
    on the CPU, where reading is free, they are read at every step. With them it reads which updates
    were skipped because a number was not finite, and logs and counts these; `max_skipped` in a row end
    the run. `samples_seen` counts over all ranks and epochs, up to the last step that was read: the
    caller passes it on to the next epoch.
    """

    epoch: int
    num_steps: int
    log_freq: int
    device: torch.device
    run_log: RunLog | None
    samples_seen: int = 0
    max_skipped: int = 1

    def __post_init__(self) -> None:
        self.losses, self.lr_sum = [], 0.0  # of the epoch so far, on this rank
        self.index = self._first_index = 0  # the current step; the first step of this process
        self._num_unknown = 0  # steps of the epoch whose losses are not known, after a resume
        self.skipped = self._in_a_row = 0  # skipped updates of the epoch; the latest in a row
        self._unread, self._unread_updates = [], []  # still on the device
        self._unwritten, self._last = [], {}  # records of steps; the last one that was written
        self._window = deque(maxlen=_TIMER_WINDOW)  # the last records, for times and rates
        self._data_seconds = 0.0
        self._start = self._step_start = time.perf_counter()

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Time the block as `data`, the wait for the loader. The step begins here: saving and validation do not count."""
        start = self._step_start = time.perf_counter()
        yield
        self._data_seconds = time.perf_counter() - start

    def state(self) -> dict[str, Any]:
        """Return the state for `resume` before the next step, also if it is of the next epoch. Raises NonFiniteLossError."""
        self._read()
        self._write()
        is_over = self.index == self.num_steps
        losses, lr_sum = ([], 0.0) if is_over else (list(self.losses), self.lr_sum)
        counts = {"samples_seen": self.samples_seen, "skipped": self.skipped}
        return {"losses": losses, "lr_sum": lr_sum, **counts, "in_a_row": self._in_a_row}

    def resume(self, index: int, state: dict[str, Any]) -> None:
        """Begin at step `index` of the epoch, with the `state()` of the resumed run.

        If it has fewer losses than `index`, as after a change of settings, they are those of the last steps.
        """
        self.index = self._first_index = index
        self.losses, self.lr_sum = list(state["losses"]), state["lr_sum"]
        self._num_unknown, self.samples_seen = index - len(self.losses), state["samples_seen"]
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]

    def add(
        self, loss: torch.Tensor, lr: float, batch: dict[str, Any], num_tokens: int = 0
    ) -> None:
        """Add the loss (a scalar tensor, any device) and lr of the current step, and count its batch.

        `num_tokens`: positions that the LLM read for it on this rank, text and image, without padding; 0 if unknown.
        """
        self.lr_sum += lr
        self._unread.append((loss.detach().float(), batch.get("sample_id")))
        record = {
            "step": self.epoch * self.num_steps + self.index,
            "epoch": self.epoch,
            "lr": lr,
            "batch_samples": batch_size(batch),
            "batch_tokens": num_tokens,
        }
        self._unwritten.append(record)

    def updated(self, is_skipped: torch.Tensor) -> None:
        """Add whether the update was skipped, on all ranks alike; call it after the `add` of the update's last batch."""
        self._unread_updates.append((self.epoch * self.num_steps + self.index, is_skipped))

    def check(self) -> None:
        """Read the losses if due. Raises NonFiniteLossError, after the same step on all ranks."""
        if self._is_due() or self.device.type == "cpu":
            self._read()

    def _read(self) -> None:
        """Fetch the losses that are still on the device; warn of those that are not finite."""
        if not self._unread:
            return
        values = torch.stack([loss for loss, _ in self._unread]).tolist()
        self._sum_counts(self._unwritten[-len(values) :])
        first = self.epoch * self.num_steps + self._num_unknown + len(self.losses)
        warning = None
        for step, value in enumerate(values, start=first):
            if not math.isfinite(value):
                _, ids = self._unread[step - first]
                samples = f" (samples {', '.join(map(str, ids))})" if ids else ""
                warning = f"step {step}: loss is {value} on rank {get_rank()}{samples}; optimizer not stepped"
                logging.warning("%s", warning)
        self.losses += values
        self._unread.clear()
        self._count_skipped(warning)

    def _sum_counts(self, records: list[dict[str, Any]]) -> None:
        """Replace the sample and token counts of steps by their sums over all ranks, in one all-reduce; add up samples."""
        counts = [record["batch_samples"] for record in records]
        counts += [record["batch_tokens"] for record in records]
        counts = list(map(int, sum_over_ranks(counts, self.device)))
        for record, samples, tokens in zip(records, counts, counts[len(records) :], strict=False):
            self.samples_seen += samples
            record |= {"samples": self.samples_seen, "batch_samples": samples}
            record["batch_tokens"] = tokens

    def _count_skipped(self, loss_warning: str | None) -> None:
        """Count and print skipped updates. Raises NonFiniteLossError, with `loss_warning` if any, after too many in a row."""
        flags = [is_skipped for _, is_skipped in self._unread_updates]
        flags = torch.stack(flags).tolist() if flags else []
        for (step, _), is_skipped in zip(self._unread_updates, flags, strict=True):
            if not is_skipped:
                self._in_a_row = 0
                continue
            self.skipped += 1
            self._in_a_row += 1
            in_a_row = f"{self._in_a_row} in a row"
            main_print(
                f"step {step}: update skipped on all ranks, {in_a_row}, {self.skipped} so far"
            )
            if self._in_a_row >= self.max_skipped:
                reason = f"step {step}: a gradient is not finite; optimizer not stepped"
                raise NonFiniteLossError(
                    f"{loss_warning or reason}; {in_a_row} (run.max_skipped_updates). "
                    "Try a smaller run.init_lr, run.max_grad_norm=1, or run.amp_dtype=bfloat16"
                )
        self._unread_updates.clear()

    def end_step(self) -> None:
        """End the step: note its time, and write and print what is due."""
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
        """Write the lines of `metrics.jsonl`; all losses must have been read."""
        memory = round(peak_memory_mib(self.device))
        losses = self.losses[len(self.losses) - len(self._unwritten) :]
        for record, loss in zip(self._unwritten, losses, strict=True):
            # JSON has no nan
            record |= {"loss": loss if math.isfinite(loss) else None, "memory_mib": memory}
            self._window.append(record)
            record |= self._rates()
            self._last = record
        self.run_log.steps(self._unwritten)
        self._unwritten = []

    def _rates(self) -> dict[str, float]:
        """Return the throughput of all ranks, and the share of time that this rank waits for data, over the window."""
        numerators = {
            "samples_per_s": "batch_samples",
            "tokens_per_s": "batch_tokens",
            "data_wait": "data_seconds",
        }
        seconds = self._window_sum("seconds")
        return {name: round(self._window_sum(key) / seconds, 4) for name, key in numerators.items()}

    def _window_sum(self, key: str) -> float:
        return sum(record[key] for record in self._window)

    def end_epoch(self) -> dict[str, float]:
        """Print the epoch's total time; return {"lr", "loss"}, the means over its steps and all ranks."""
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
        """Return whether a progress line is due at the current step."""
        return self.index % self.log_freq == 0 or self.index == self.num_steps - 1

    def _progress(self, record: dict[str, Any]) -> str:
        """Return the progress line: the fields of 2023, then throughput and the share of time spent waiting for data."""
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
