"""Batches from datasets: an endless stream for training, one pass over a validation split.

Each dataset has its own DataLoader. Every training step draws one of them by `sample_ratio` (115 :
14 in stage 1) and takes its next batch, so a batch never mixes datasets. Source: MiniGPT-4 2023.
"""

import copy
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import count
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, Subset

from minigpt4.common.waiting import waiting_for
from minigpt4.datasets.datasets.base_dataset import Place, SampleIndex
from minigpt4.datasets.datasets.collate import collate_usable, collate_with_progress
from minigpt4.datasets.datasets.image_controls import with_other_images
from minigpt4.datasets.datasets.skips import DataError
from minigpt4.datasets.datasets.worker_status import WorkerStatus, worker_info


class EndlessSampler(Sampler):
    """Yields SampleIndex endlessly: one permutation per (seed, epoch), distributed over the ranks round-robin.

    Epochs follow each other without a gap: over all ranks, each contains every index exactly once. None is cut or
    padded, and a dataset smaller than a batch simply repeats. `start`: indices that this rank has already taken.
    """

    def __init__(self, size: int, place: Place, start: int = 0):
        self.size, self.place = size, place
        self.start = start

    def __iter__(self) -> Iterator[SampleIndex]:
        permuted_epoch, permutation = None, None
        for step in count(self.start):
            epoch, position = divmod(step * self.place.world_size + self.place.rank, self.size)
            if epoch != permuted_epoch:
                rng = np.random.default_rng([self.place.seed, epoch])
                permuted_epoch, permutation = epoch, rng.permutation(self.size)
            yield SampleIndex(permutation[position], epoch)


def mixing_ratios(datasets: Sequence, ratios: Sequence | None = None) -> np.ndarray:
    """Return the probability of each dataset, proportional to `ratios`, by default to the datasets' `sample_ratio`.

    If no dataset has a ratio, all are equally likely. Raises ValueError if only some have one, or one is not above 0.
    """
    ratios = [dataset.sample_ratio for dataset in datasets] if ratios is None else list(ratios)
    if set(ratios) == {None}:
        ratios = [1.0] * len(ratios)
    names = [dataset.name for dataset in datasets]
    for name, ratio in zip(names, ratios, strict=True):
        if ratio is None or not ratio > 0:
            given = ", ".join(f"{each} {its}" for each, its in zip(names, ratios, strict=True))
            raise ValueError(
                f"datasets.{name}.sample_ratio: {ratio}; expected a number above 0, or none for any dataset "
                f"(here: {given})"
            )
    return np.array(ratios, dtype=np.float64) / sum(ratios)


class _Loader(DataLoader):
    """A DataLoader that does not warn about more workers than CPUs: workers also wait for files."""

    def check_worker_number_rationality(self) -> None:
        """Replace torch's check, which warns."""


class TrainLoader:
    """Endless batches for one rank, each from a dataset drawn by ratio; equal seeds give equal batches.

    Each dataset gets `num_workers` processes (0: this process loads). `batch_size` is the default for datasets
    without their own. If more than `max_bad_fraction` of a dataset's samples are unusable, DataError ends the run.
    `state()` describes the batches handed out, not what workers have prefetched; `resume(state)`
    continues exactly after them.
    """

    def __init__(
        self,
        datasets: Sequence,
        ratios: Sequence | None = None,
        *,
        batch_size: int,
        num_workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_bad_fraction: float = 0.05,
        prefetch_factor: int = 2,
    ):
        self.datasets = list(datasets)
        self.ratios = mixing_ratios(self.datasets, ratios)
        self._place = Place(seed, rank, world_size)
        # Of each dataset: batches handed out, and per worker [stream position, skip counts] after the last of them.
        self._progress = {dataset.name: {"batches": 0, "workers": {}} for dataset in self.datasets}
        self._rng = np.random.default_rng([seed, rank])
        self._iterators, self._loaders = {}, []  # workers start when their dataset is first drawn
        for dataset in self.datasets:
            _bind(dataset, self._place, num_workers, max_bad_fraction)
            is_stream = isinstance(dataset, IterableDataset)
            loader = _Loader(
                dataset,
                batch_size=dataset.batch_size or batch_size,
                sampler=None if is_stream else EndlessSampler(len(dataset), self._place),
                num_workers=num_workers,
                prefetch_factor=prefetch_factor if num_workers else None,
                pin_memory=torch.cuda.is_available(),
                collate_fn=partial(collate_with_progress, dataset),
                worker_init_fn=partial(_init_worker, dataset),
                # without its own generator it would advance torch's global one, which the model uses
                generator=torch.Generator().manual_seed(seed),
            )
            self._loaders.append(loader)

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> dict[str, Any]:
        chosen = 0
        if len(self.ratios) > 1:
            chosen = int(self._rng.choice(len(self.ratios), p=self.ratios))
        name, loader = self.datasets[chosen].name, self._loaders[chosen]
        progress = self._progress[name]
        try:
            with _waiting_for(self.datasets[chosen], loader.num_workers, progress["batches"]):
                if chosen not in self._iterators:
                    self._iterators[chosen] = iter(loader)
                batch = next(self._iterators[chosen])
        except DataError as error:
            # the traceback would keep the DataLoader alive, whose workers then take 5 s to stop
            error.__traceback__ = None
            self.close()
            raise _without_worker_traceback(error) from None
        worker, *worker_progress = batch.pop("progress")
        progress["batches"] += 1
        progress["workers"][worker] = worker_progress
        return batch | {"sample_id": [f"{name}/{sample_id}" for sample_id in batch["sample_id"]]}

    def state(self) -> dict[str, Any]:
        """Return what `resume` needs, as plain containers."""
        mixing, progress = self._rng.bit_generator.state, copy.deepcopy(self._progress)
        return {"seed": self._place.seed, "mixing": mixing, "progress": progress}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue after the last batch that `state`, from a loader with the same settings, describes."""
        self._rng.bit_generator.state = state["mixing"]
        for dataset, loader in zip(self.datasets, self._loaders, strict=True):
            self._progress[dataset.name] = progress = state["progress"][dataset.name]
            dataset.first_worker = progress["batches"] % max(1, loader.num_workers)
            positions = {}
            for worker, (position, counts) in progress["workers"].items():
                dataset.skips.restore(worker, counts)
                positions[worker] = position
            # a stream continues where each worker stopped, map-style data after the indices already taken
            if isinstance(dataset, IterableDataset):
                dataset.start = positions
            else:
                loader.sampler.start = progress["batches"] * loader.batch_size

    def epoch_length(self) -> int | None:
        """Return this rank's number of batches in one pass over all datasets; None if one of them is a stream."""
        if any(isinstance(dataset, IterableDataset) for dataset in self.datasets):
            return None
        num_batches = 0
        for dataset, loader in zip(self.datasets, self._loaders, strict=True):
            num_batches += math.ceil(len(dataset) / (loader.batch_size * self._place.world_size))
        return num_batches

    def skip_report(self) -> dict[str, dict[str, int]]:
        """Return {dataset name: `SkipCounter.report()`}, counted over the batches handed out."""
        report = {}
        for dataset in self.datasets:
            workers = self._progress[dataset.name]["workers"].values()
            report[dataset.name] = dataset.skips.report([counts for _, counts in workers])
        return report

    def close(self) -> None:
        """Stop the workers."""
        self._iterators.clear()


class EvalLoader(_Loader):
    """One rank's share of a validation split, batch by batch; over all ranks, each usable sample comes once.

    A map-style split is shared out by index, so its batches do not depend on the number of workers. `with_others`:
    samples also have "other_images", see image_controls.
    """

    def __init__(
        self,
        dataset: Any,
        place: Place,
        batch_size: int,
        num_workers: int,
        max_bad: float,
        with_others: bool = False,
    ):
        _bind(dataset, place, num_workers, max_bad)
        self.source = dataset
        dataset = with_other_images(dataset) if with_others else dataset
        if not isinstance(dataset, IterableDataset):
            dataset = Subset(dataset, range(place.rank, len(dataset), place.world_size))
        super().__init__(
            dataset,
            batch_size,
            num_workers=num_workers,
            collate_fn=collate_usable,
            worker_init_fn=partial(_init_worker, self.source),
            generator=torch.Generator().manual_seed(place.seed),
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = super().__iter__()
        try:
            for number in count():
                with _waiting_for(self.source, self.num_workers, number):
                    batch = next(batches, None)
                if batch is None:
                    return
                if batch:  # {} if none of its samples could be used
                    yield batch
        except DataError as error:
            raise _without_worker_traceback(error) from None


def _bind(dataset: Any, place: Place, num_workers: int, max_bad_fraction: float) -> None:
    dataset.worker_status = WorkerStatus(num_workers)  # in case an overridden `bind` sets none
    dataset.bind(place, num_workers, max_bad_fraction)
    dataset.leaves_normalising = True


def _without_worker_traceback(error: DataError) -> DataError:
    """Return a DataError without the worker's traceback that the DataLoader puts before its message."""
    return DataError(str(error).rpartition("DataError: ")[2].strip())


def _waiting_for(dataset: Any, num_workers: int, batch_number: int) -> AbstractContextManager:
    """Return a context in which this process declares that it waits for a batch of a dataset."""
    worker = batch_number % max(1, num_workers)  # workers return batches in turn

    def describe() -> str:
        pid, shard = dataset.worker_status.process_and_shard(worker)
        where = f", now in {dataset.listing()[shard]}" if shard is not None else ""
        who = f"worker {worker} (process {pid or 'not begun'})" if num_workers else "a batch"
        return f"{who} of datasets.{dataset.name}{where}"

    return waiting_for(describe, partial(dataset.worker_status.num_fast_forwarded, worker))


def _init_worker(dataset: Any, worker: int) -> None:
    """Keep a worker running while its trainer is told to stop, and quiet when the trainer is killed.

    On SIGTERM (torchrun sends it to the whole process group) and other signals (SLURM sends them to each process)
    the trainer saves a checkpoint. A worker must survive that: it gets its own process group and ignores those
    signals. If the trainer is killed while it receives a batch, the worker's queue thread loses its connection;
    the traceback of that error would only be noise.
    """
    dataset.worker_status.set_process(worker_info()[0])
    os.setpgrp()
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _hide_lost_connections


def _hide_lost_connections(
    kind: type, error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)
