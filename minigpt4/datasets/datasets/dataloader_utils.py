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
from itertools import chain, count
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, Subset, default_collate

from minigpt4.common.waiting import waiting_for
from minigpt4.datasets.datasets.base_dataset import DataError, Place, SampleIndex, worker_place
from minigpt4.datasets.datasets.image_controls import with_other_images
from minigpt4.datasets.datasets.whereabouts import Whereabouts


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


def collate(samples: Sequence[dict]) -> dict[str, Any]:
    """Return the batch of some samples (see BaseDataset).

    "image" is [B, 3, S, S]. Where a sample has "images" it is those of all samples in their order,
    [N, 3, S, S] ([0, 3, 0, 0] without any), and "num_images", which then comes first, has B
    integers. "normalise" is that of one sample and left out without an image, "image_id" an int64
    tensor [B] of integers; all else is a list of length B, with () for what only other samples have.
    """
    batch = {}
    if any("images" in sample for sample in samples):
        groups = [
            sample["images"] if "images" in sample else [sample["image"]] for sample in samples
        ]
        images = list(chain.from_iterable(groups))
        batch["num_images"] = list(map(len, groups))
    else:
        images = [sample["image"] for sample in samples]
    # in a worker the stack is written to shared memory at once
    batch["image"] = default_collate(images) if images else torch.empty(0, 3, 0, 0)
    for key in dict.fromkeys(chain.from_iterable(samples)):
        if key not in ("image", "images"):
            batch[key] = [sample.get(key, ()) for sample in samples]
    # a batch never mixes datasets: one "normalise" is that of all
    normalise = next(filter(None, batch.pop("normalise", ())), None)
    if normalise and images:
        batch["normalise"] = normalise
    if all(isinstance(number, int) for number in batch.get("image_id", [""])):
        batch["image_id"] = torch.tensor(batch["image_id"])
    return batch


def _collate_with_progress(dataset: Any, samples: Sequence[dict]) -> dict[str, Any]:
    """Return a batch that notes how far this worker has come: "progress" (worker, position, counts).

    The position is that of a stream, None for map-style data; the counts are `SkipCounter.row()`.
    """
    positions = [sample.pop("stream", None) for sample in samples]
    return collate(samples) | {"progress": (worker_place()[0], positions[-1], dataset.skips.row())}


def mixing_ratios(datasets: Sequence, ratios: Sequence | None = None) -> np.ndarray:
    """Return the probability of each dataset: its share of `ratios`, by default of the datasets' `sample_ratio`.

    Without any ratio all are equally likely. Raises ValueError if only some have one.
    """
    ratios = [dataset.sample_ratio for dataset in datasets] if ratios is None else list(ratios)
    if set(ratios) == {None}:
        ratios = [1.0] * len(ratios)
    for dataset, ratio in zip(datasets, ratios, strict=True):
        if ratio is None or not ratio > 0:
            here = ", ".join(
                f"{each.name} {its}" for each, its in zip(datasets, ratios, strict=True)
            )
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
                collate_fn=partial(_collate_with_progress, dataset),
                worker_init_fn=partial(_begin_worker, dataset),
                generator=torch.Generator().manual_seed(seed),  # else it draws from the model's
            )
            self._loaders.append(loader)

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> dict[str, Any]:
        source = (
            int(self._rng.choice(len(self.ratios), p=self.ratios)) if len(self.ratios) > 1 else 0
        )
        try:
            turn = self._progress[self.datasets[source].name]["batches"]
            with _waiting_for(self.datasets[source], self._loaders[source].num_workers, turn):
                if source not in self._iterators:
                    self._iterators[source] = iter(self._loaders[source])
                batch = next(self._iterators[source])
        except DataError as error:
            error.__traceback__ = (
                None  # it would keep the DataLoader alive, whose workers then take 5 s to stop
            )
            self.close()
            raise _readable(error) from None
        name = self.datasets[source].name
        worker, *reached = batch.pop("progress")
        self._progress[name]["batches"] += 1
        self._progress[name]["workers"][worker] = reached
        return batch | {"sample_id": [f"{name}/{sample_id}" for sample_id in batch["sample_id"]]}

    def state(self) -> dict[str, Any]:
        """Return what `resume` needs, as plain containers."""
        progress = copy.deepcopy(self._progress)
        return {
            "seed": self._place.seed,
            "mixing": self._rng.bit_generator.state,
            "progress": progress,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Continue behind the last batch of a loader of the same settings whose `state()` this was."""
        self._rng.bit_generator.state = state["mixing"]
        for dataset, loader in zip(self.datasets, self._loaders, strict=True):
            self._progress[dataset.name] = progress = state["progress"][dataset.name]
            dataset.first_worker = progress["batches"] % max(1, loader.num_workers)
            for worker, (_, counts) in progress["workers"].items():
                dataset.skips.restore(worker, counts)
            if isinstance(dataset, IterableDataset):
                dataset.start = {
                    worker: position for worker, (position, _) in progress["workers"].items()
                }
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
        settings = {
            "num_workers": num_workers,
            "collate_fn": _collate_usable,
            "generator": generator,
        }
        super().__init__(
            dataset, batch_size, worker_init_fn=partial(_begin_worker, self.source), **settings
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


def _collate_usable(samples: Sequence[dict | None]) -> dict[str, Any]:
    """Return the batch of those samples that could be used; {} without any."""
    samples = [sample for sample in samples if sample is not None]
    return collate(samples) if samples else {}


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
