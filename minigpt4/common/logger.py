"""What a run says and writes: log lines of the 2023 shapes, `log.txt`, `metrics.jsonl`, optional TensorBoard."""

import json
import logging
import math
import os
import time
from collections import deque
from contextlib import contextmanager
from datetime import timedelta

import torch

from minigpt4.common.device import peak_memory_mib
from minigpt4.common.dist_utils import get_rank, get_world_size, is_main_process, main_print, sum_over_ranks

_TIMER_WINDOW = 20  # iterations that `time` and `data` are means of


class NonFiniteLossError(ValueError):
    """Losses or gradients that are nan or infinite, again and again; the message names step, rank and samples."""


def setup_logger():
    """Let rank 0 log from INFO on and the other ranks from WARNING on, to stderr."""
    level = logging.INFO if is_main_process() else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s [%(levelname)s] %(message)s", force=True)


def whole_seconds(seconds):
    """Return a duration as H:MM:SS."""
    return str(timedelta(seconds=int(seconds)))


class RunLog:
    """The text files of a run: `log.txt`, `metrics.jsonl`, and TensorBoard's with `tensorboard`. Rank 0 writes.

    A full disk or a lost folder costs lines and one warning, never the training.
    """

    def __init__(self, folder, tensorboard=False):
        self.folder, self._has_warned, self._board = folder, False, None
        if tensorboard and is_main_process():
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder))

    def config(self, plain):
        """Append the whole configuration to `log.txt`, as one pretty-printed JSON object."""
        self._append("log.txt", json.dumps(plain, indent=4))

    def epoch(self, stats):
        """Append the numbers of an epoch to `log.txt`, as one JSON line."""
        self._append("log.txt", json.dumps(stats))

    def has_epoch(self, stats):
        """Return whether `log.txt` has a line that begins with these numbers of an epoch."""
        path = self.folder / "log.txt"
        return path.is_file() and f"\n{json.dumps(stats)[:-1]}" in path.read_text(encoding="utf-8")

    def steps(self, records):
        """Append one JSON line a step to `metrics.jsonl`."""
        if records:
            self._append("metrics.jsonl", "\n".join(json.dumps(record) for record in records))
        for record in records if self._board else ():
            for key in ("loss", "lr"):
                self._board.add_scalar(f"train/{key}", record[key], record["step"])

    def close(self):
        if self._board:
            self._board.close()

    def _append(self, name, text):
        if not is_main_process():
            return
        try:
            with open(self.folder / name, "ab+") as file:  # a run that was killed may have left half a line
                is_cut = file.seek(0, os.SEEK_END) and file.seek(-1, os.SEEK_END) and file.read(1) != b"\n"
                file.write(("\n" * bool(is_cut) + text + "\n").encode())
        except OSError as error:
            if not self._has_warned:
                logging.warning("cannot write %s (%s); training goes on without it", self.folder / name, error)
            self._has_warned = True


class MetricLogger:
    """Losses, times and progress of one epoch of `num_steps` iterations.

    Losses stay on the device until a line is due, so that no step waits for the one before; on the CPU, where reading
    is free, they are read at every step. Updates that were skipped for numbers that are not finite are read with them,
    named and counted; `max_skipped` in a row end the run.
    `samples_seen` counts over all ranks and goes on from epoch to epoch: the caller hands it on.
    """

    def __init__(self, epoch, num_steps, log_freq, device, run_log, samples_seen=0, max_skipped=1):
        self.epoch, self.num_steps, self.log_freq, self.device = epoch, num_steps, log_freq, device
        self.run_log, self.samples_seen = run_log, samples_seen
        self.losses, self.lr_sum, self.index = [], 0.0, 0
        self._first_index = self._num_unknown = 0
        self.max_skipped, self.skipped, self._in_a_row = max_skipped, 0, 0
        self._unread, self._unwritten, self._unread_updates = [], [], []
        self._times, self._data_times = deque(maxlen=_TIMER_WINDOW), deque(maxlen=_TIMER_WINDOW)
        self._start = self._step_start = time.perf_counter()

    @contextmanager
    def fetching(self):
        """Time the block as `data`: waiting for the loader."""
        start = time.perf_counter()
        yield
        self._data_times.append(time.perf_counter() - start)

    def state(self):
        """Return what `go_on` needs before the next step; reads and writes what was not due yet.

        After the last step of an epoch that is the next one's first. Raises NonFiniteLossError.
        """
        self._read()
        self._write()
        is_over = self.index == self.num_steps
        losses, lr_sum = ([], 0.0) if is_over else (list(self.losses), self.lr_sum)
        counts = {"samples_seen": self.samples_seen, "skipped": self.skipped, "in_a_row": self._in_a_row}
        return {"losses": losses, "lr_sum": lr_sum, **counts}

    def go_on(self, index, state):
        """Begin at step `index` of the epoch instead of 0, with the `state()` of the run that came so far.

        Fewer losses than steps, as after other settings, are those of the end of `index` steps.
        """
        self.index = self._first_index = index
        self.losses, self.lr_sum, self.samples_seen = list(state["losses"]), state["lr_sum"], state["samples_seen"]
        self._num_unknown = index - len(self.losses)
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]

    def add(self, loss, lr, batch):
        """Take the loss (a scalar tensor, any device) and lr of the current iteration, and what batch it is of."""
        self.samples_seen += len(next(iter(batch.values()))) * get_world_size()
        self.lr_sum += lr
        self._unread.append((loss.detach().float(), batch.get("sample_id")))
        step = self.epoch * self.num_steps + self.index
        self._unwritten.append({"step": step, "epoch": self.epoch, "lr": lr, "samples": self.samples_seen})

    def updated(self, is_skipped):
        """Take whether the optimizer's step was skipped on all ranks, a tensor; after the `add` of its last batch."""
        step = self.epoch * self.num_steps + self.index
        self._unread_updates.append((step, is_skipped))

    def check(self):
        """Read the losses and skipped updates that are due.

        Raises NonFiniteLossError, on all ranks at the same step, after `max_skipped` skipped updates in a row.
        """
        if self._is_due() or self.device.type == "cpu":
            self._read()

    def _read(self):
        if not self._unread:
            return
        values = torch.stack([loss for loss, _ in self._unread]).tolist()
        first = self.epoch * self.num_steps + self._num_unknown + len(self.losses)
        found = zip(range(first, first + len(values)), values, [ids for _, ids in self._unread], strict=True)
        bad = {step: self._complaint(step, value, ids) for step, value, ids in found if not math.isfinite(value)}
        for complaint in bad.values():
            logging.warning("%s", complaint)
        self.losses += values
        self._unread.clear()
        self._judge_updates(list(bad.values()))

    def _judge_updates(self, complaints):
        flags = torch.stack([flag for _, flag in self._unread_updates]).tolist() if self._unread_updates else []
        for (step, _), is_skipped in zip(self._unread_updates, flags, strict=True):
            self.skipped, self._in_a_row = self.skipped + is_skipped, self._in_a_row + 1 if is_skipped else 0
            if not is_skipped:
                continue
            main_print(f"step {step}: update skipped on all ranks, {self._in_a_row} in a row, {self.skipped} so far")
            if self._in_a_row >= self.max_skipped:
                found = (
                    complaints[-1] if complaints else f"step {step}: a gradient is not finite; optimizer not stepped"
                )
                raise NonFiniteLossError(
                    f"{found}; {self._in_a_row} in a row (run.max_skipped_updates). "
                    "Try a smaller run.init_lr, run.max_grad_norm=1, or run.amp_dtype=bfloat16"
                )
        self._unread_updates.clear()

    def end_step(self):
        """Close the iteration: note its time, and print and write what is due."""
        now = time.perf_counter()
        self._times.append(now - self._step_start)
        self._step_start = now
        self._unwritten[-1] |= {"seconds": self._times[-1], "data_seconds": self._data_times[-1]}
        if not self._unread:
            lr = self._unwritten[-1]["lr"]
            self._write()
            if self._is_due():
                main_print(self._progress(lr))
        self.index += 1

    def _write(self):
        memory, losses = peak_memory_mib(self.device), self.losses[len(self.losses) - len(self._unwritten) :]
        for record, loss in zip(self._unwritten, losses, strict=True):
            record |= {"loss": loss if math.isfinite(loss) else None, "memory_mib": round(memory)}  # JSON knows no nan
        self.run_log.steps(self._unwritten)
        self._unwritten.clear()

    def end_epoch(self):
        """Print the epoch's total; return {"lr", "loss"}, means over its iterations and all ranks."""
        seconds = time.perf_counter() - self._start
        per_step = f"{seconds / max(self.index - self._first_index, 1):.4f} s / it"
        main_print(f"Train: data epoch: [{self.epoch}] Total time: {whole_seconds(seconds)} ({per_step})")
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        sums = [self.lr_sum, len(self.losses), math.fsum(finite), len(finite)]
        lr_sum, num_lr, loss_sum, num_losses = sum_over_ranks(sums, self.device)
        stats = {"lr": lr_sum / num_lr, "loss": loss_sum / num_losses if num_losses else math.nan}
        logging.info("Averaged stats: %s", "  ".join(f"{name}: {value:.4f}" for name, value in stats.items()))
        return stats

    def _is_due(self):
        return self.index % self.log_freq == 0 or self.index == self.num_steps - 1

    def _progress(self, lr):
        mean_time = (self._step_start - self._start) / (self.index + 1 - self._first_index)
        fields = [
            f"Train: data epoch: [{self.epoch}]",
            f"[{self.index:>{len(str(self.num_steps))}}/{self.num_steps}]",
            f"eta: {whole_seconds(mean_time * (self.num_steps - self.index))}",
            f"lr: {lr:.6f}",
            f"loss: {self.losses[-1]:.4f}",
            f"time: {sum(self._times) / len(self._times):.4f}",
            f"data: {sum(self._data_times) / len(self._data_times):.4f}",
        ]
        if self.device.type == "cuda":
            fields.append(f"max mem: {peak_memory_mib(self.device):.0f}")
        return "  ".join(fields)

    def _complaint(self, step, value, sample_ids):
        samples = f" (samples {', '.join(map(str, sample_ids))})" if sample_ids else ""
        return f"step {step}: loss is {value} on rank {get_rank()}{samples}; optimizer not stepped"
