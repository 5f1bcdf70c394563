"""From datasets to one endless stream of batches, and to one pass over a validation split.

Each dataset has a DataLoader of its own. Every step one of them is drawn by `sample_ratio` (115 :
14 in stage 1) and gives the next batch, so a batch never mixes datasets. Source: MiniGPT-4 2023.
"""

import copy
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
from minigpt4.datasets.datasets.whereabouts import Whereabouts, worker_place


class EndlessSampler(Sampler):
    """Yields SampleIndex without end: one permutation a (seed, epoch), dealt card by card to the ranks.

    Any `size` consecutive cards of all ranks together are each index once, so no epoch is cut or
    padded and a set smaller than a batch simply comes round again. `start`: cards already had.
    """

    def __init__(self, size: int, place: Place, start: int = 0):
        self.size, self.place = size, place
        self.start = start

    def __iter__(self) -> Iterator[SampleIndex]:
        current, order = None, None
        for turn in count(self.start):
            epoch, card = divmod(turn * self.place.world_size + self.place.rank, self.size)
            if epoch != current:
                rng = np.random.default_rng([self.place.seed, epoch])
                current, order = epoch, rng.permutation(self.size)
            yield SampleIndex(order[card], epoch)


def mixing_ratios(datasets: Sequence, ratios: Sequence | None = None) -> np.ndarray:
    """Return the probability of each dataset: its share of `ratios`, by default of the datasets' `sample_ratio`.

    Without any ratio all are equally likely. Raises ValueError if only some have one.
    """
    ratios = [dataset.sample_ratio for dataset in datasets] if ratios is None else list(ratios)
    if set(ratios) == {None}:
        ratios = [1.0] * len(ratios)
    pairs = list(zip(datasets, ratios, strict=True))
    for dataset, ratio in pairs:
        if ratio is None or not ratio > 0:
            here = ", ".join(f"{each.name} {its}" for each, its in pairs)
            raise ValueError(
                f"datasets.{dataset.name}.sample_ratio: {ratio}; expected a number above 0, or none for any dataset "
                f"(here: {here})"
            )
    return np.array(ratios, dtype=np.float64) / sum(ratios)


class _Loader(DataLoader):
    """A DataLoader that may have more workers than there are CPUs without a warning: they wait for files, too."""

    def check_worker_number_rationality(self) -> None:
        """Warn of nothing."""


class TrainLoader:
    """Endless batches of one rank, drawn from datasets by ratio; equal seeds give equal batches.

    `num_workers` processes a dataset, 0 for none; `batch_size` holds where a dataset has none of
    its own. A share of more than `max_bad_fraction` unusable samples ends the run with a DataError.
    `state()` tells how far the batches handed out reach, not what workers have fetched ahead;
    `resume(state)` continues exactly behind them.
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
        # Which samples a rank reads, and how far the batches handed out reach in each worker of a dataset.
        self._place = Place(seed, rank, world_size)
        self._progress = {dataset.name: {"batches": 0, "workers": {}} for dataset in self.datasets}
        self._rng = np.random.default_rng([seed, rank])
        # Workers start with the first batch of their dataset: one with a ratio of 0 has none.
        self._iterators, self._loaders = {}, []
        for dataset in self.datasets:
            _bind(dataset, self._place, num_workers, max_bad_fraction)
            is_stream = isinstance(dataset, IterableDataset)
            loader = _Loader(
                dataset,
                batch_size=dataset.batch_size or batch_size,
                sampler=None if is_stream else EndlessSampler(len(dataset), self._place),
                num_workers=num_workers,  # they live as long as the one endless iteration
                prefetch_factor=prefetch_factor if num_workers else None,
                pin_memory=torch.cuda.is_available(),
                collate_fn=partial(collate_with_progress, dataset),
                worker_init_fn=partial(_begin_worker, dataset),
                generator=torch.Generator().manual_seed(seed),  # else it draws from the model's
            )
            self._loaders.append(loader)

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> dict[str, Any]:
        # of one dataset nothing is drawn
        has_choice = len(self.ratios) > 1
        source = int(self._rng.choice(len(self.ratios), p=self.ratios)) if has_choice else 0
        name, loader = self.datasets[source].name, self._loaders[source]
        progress = self._progress[name]
        try:
            with _waiting_for(self.datasets[source], loader.num_workers, progress["batches"]):
                if source not in self._iterators:
                    self._iterators[source] = iter(loader)
                batch = next(self._iterators[source])
        except DataError as error:
            # it would keep the DataLoader alive, whose workers then take 5 s to stop
            error.__traceback__ = None
            self.close()
            raise _readable(error) from None
        worker, *reached = batch.pop("progress")
        progress["batches"] += 1
        progress["workers"][worker] = reached
        return batch | {"sample_id": [f"{name}/{sample_id}" for sample_id in batch["sample_id"]]}

    def state(self) -> dict[str, Any]:
        """Return what `resume` needs, as plain containers."""
        mixing, progress = self._rng.bit_generator.state, copy.deepcopy(self._progress)
        return {"seed": self._place.seed, "mixing": mixing, "progress": progress}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue behind the last batch of a loader of the same settings whose `state()` this was."""
        self._rng.bit_generator.state = state["mixing"]
        for dataset, loader in zip(self.datasets, self._loaders, strict=True):
            self._progress[dataset.name] = progress = state["progress"][dataset.name]
            dataset.first_worker = progress["batches"] % max(1, loader.num_workers)
            positions = {}
            for worker, (position, counts) in progress["workers"].items():
                dataset.skips.restore(worker, counts)
                positions[worker] = position
            # a stream goes on where each worker stood, map-style data behind the cards already had
            if isinstance(dataset, IterableDataset):
                dataset.start = positions
            else:
                loader.sampler.start = progress["batches"] * loader.batch_size

    def epoch_length(self) -> int | None:
        """Return the number of batches of this rank in a true pass over map-style data; None if there are shards."""
        if any(isinstance(dataset, IterableDataset) for dataset in self.datasets):
            return None
        ranks, pairs = self._place.world_size, zip(self.datasets, self._loaders, strict=True)
        return sum(-(-len(dataset) // (loader.batch_size * ranks)) for dataset, loader in pairs)

    def skip_report(self) -> dict[str, dict[str, int]]:
        """Return {dataset: its `SkipCounter.report()`} of the batches handed out."""
        report = {}
        for dataset in self.datasets:
            workers = self._progress[dataset.name]["workers"].values()
            report[dataset.name] = dataset.skips.report([row for _, row in workers])
        return report

    def close(self) -> None:
        """Stop the workers."""
        self._iterators.clear()


class EvalLoader(_Loader):
    """One rank's share of a validation split, batch by batch; all ranks together give each usable sample once.

    A map-style split is dealt by index, so batches are the same for any number of workers. `with_others`: samples
    have "other_images", see image_controls.
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
        generator = torch.Generator().manual_seed(place.seed)
        super().__init__(
            dataset,
            batch_size,
            num_workers=num_workers,
            collate_fn=collate_usable,
            worker_init_fn=partial(_begin_worker, self.source),
            generator=generator,
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = super().__iter__()
        try:
            for turn in count():
                with _waiting_for(self.source, self.num_workers, turn):
                    batch = next(batches, None)
                if batch is None:
                    return
                if batch:
                    yield batch
        except DataError as error:
            raise _readable(error) from None


def _bind(dataset: Any, place: Place, num_workers: int, max_bad_fraction: float) -> None:
    dataset.whereabouts = Whereabouts(num_workers)  # for one whose `bind` does not make any
    dataset.bind(place, num_workers, max_bad_fraction)
    dataset.leaves_normalising = True


def _readable(error: DataError) -> DataError:
    """Return a DataError without the worker's whole traceback that stands before its message."""
    return DataError(str(error).rpartition("DataError: ")[2].strip())


def _waiting_for(dataset: Any, num_workers: int, turn: int) -> AbstractContextManager:
    """Return a context that says: this process waits for batch number `turn` of a dataset."""
    worker = turn % max(1, num_workers)  # they are asked in turn

    def what() -> str:
        pid, shard = dataset.whereabouts.of(worker)
        where = f", now in {dataset.listing()[shard]}" if shard is not None else ""
        who = f"worker {worker} (process {pid or 'not begun'})" if num_workers else "a batch"
        return f"{who} of datasets.{dataset.name}{where}"

    return waiting_for(what, partial(dataset.whereabouts.passed_by, worker))


def _begin_worker(dataset: Any, worker: int) -> None:
    """Keep a worker alive and silent whatever becomes of its trainer.

    torchrun sends SIGTERM to the trainer's whole process group, SLURM a signal to each process, and the
    trainer then saves: so it has a group of its own, and ignores what else the trainer saves at. A trainer
    killed while it takes a batch breaks a connection of the thread that hands batches over, whose traceback
    says nothing new.
    """
    dataset.whereabouts.begin(worker_place()[0])
    os.setpgrp()
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _say_unless_the_trainer_is_gone


def _say_unless_the_trainer_is_gone(
    kind: type, error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)
