"""From datasets to one endless stream of batches.

Each dataset has a DataLoader of its own. Every step one of them is drawn by `sample_ratio` (115 : 14 in stage 1) and
gives the next batch, so a batch never mixes datasets. Source: MiniGPT-4 2023; there the draw was not seeded.
"""

import os
import sys
from itertools import count

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, default_collate

from minigpt4.datasets.datasets.base_dataset import DataError, Place, worker_place


class EndlessSampler(Sampler):
    """Yields (epoch, index) without end: one permutation a (seed, epoch), dealt card by card to the ranks.

    Any `size` consecutive cards of all ranks together are each index once, so no epoch is cut or padded and a set
    smaller than a batch simply comes round again. `start` is the number of cards that this rank has already had.
    """

    def __init__(self, size, place, start=0):
        self.size, self.place, self.start = size, place, start

    def __iter__(self):
        current, order = None, None
        for turn in count(self.start):
            epoch, card = divmod(turn * self.place.world_size + self.place.rank, self.size)
            if epoch != current:
                current, order = epoch, np.random.default_rng([self.place.seed, epoch]).permutation(self.size)
            yield epoch, int(order[card])


def collate(samples):
    """Return a batch: tensors stacked, integers as one int64 tensor, "normalise" of one, everything else as a list.

    What only some samples have, such as the turns of a conversation, is () for the others.
    """
    keys = dict.fromkeys(key for sample in samples for key in sample)
    batch = {key: [sample.get(key, ()) for sample in samples] for key in keys}
    batch["image"] = default_collate(batch["image"])  # in a worker: written to shared memory at once
    if "normalise" in batch:
        batch["normalise"] = batch["normalise"][0]  # a batch never mixes datasets
    if "image_id" in batch:
        batch["image_id"] = torch.tensor(batch["image_id"])
    return batch


class _Collate:
    """Collates samples of a dataset, and notes how far this worker has come: "progress" (worker, position, counts).

    The position is that of a stream, None for map-style data; the counts are of usable and skipped samples so far.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __call__(self, samples):
        positions = [sample.pop("stream", None) for sample in samples]
        return collate(samples) | {"progress": (worker_place()[0], positions[-1], self.dataset.skips.row())}


def mixing_ratios(datasets, ratios=None):
    """Return the probability of each dataset: its share of `ratios`, by default of the datasets' `sample_ratio`.

    Without any ratio all are equally likely. Raises ValueError if some datasets have one and others not.
    """
    ratios = [dataset.sample_ratio for dataset in datasets] if ratios is None else list(ratios)
    if all(ratio is None for ratio in ratios):
        ratios = [1.0] * len(ratios)
    for dataset, ratio in zip(datasets, ratios, strict=True):
        if ratio is None or not ratio > 0:
            raise ValueError(
                f"datasets.{dataset.name}.sample_ratio: {ratio}; expected a number above 0, or none for any dataset "
                f"(here: {', '.join(f'{d.name} {r}' for d, r in zip(datasets, ratios, strict=True))})"
            )
    return np.array(ratios, dtype=np.float64) / sum(ratios)


def build_train_loader(
    datasets,
    ratios=None,
    *,
    batch_size,
    num_workers=0,
    seed=0,
    rank=0,
    world_size=1,
    max_bad_fraction=0.05,
    prefetch_factor=2,
):
    """Return a TrainLoader, the endless iterator of one rank's batches.

    `num_workers` processes a dataset, 0 for none. `batch_size` holds where a dataset has none of its own.
    `max_bad_fraction` is the share of unusable samples at which the run stops with a DataError.
    """
    place = Place(seed, rank, world_size)
    return TrainLoader(datasets, ratios, place, batch_size, num_workers, max_bad_fraction, prefetch_factor)


class TrainLoader:
    """Endless batches of one rank, drawn from datasets by ratio; equal seeds give equal batches.

    `state()` tells how far the batches handed out reach, not what workers have fetched ahead; `resume(state)` goes on
    right behind them, with the same settings, exactly.
    """

    def __init__(self, datasets, ratios, place, batch_size, num_workers, max_bad_fraction, prefetch_factor):
        self.datasets = list(datasets)
        self.ratios = mixing_ratios(self.datasets, ratios)
        self._place = place
        self._progress = {dataset.name: {"batches": 0, "workers": {}} for dataset in self.datasets}
        self._rng = np.random.default_rng([place.seed, place.rank])
        self._iterators = {}
        self._loaders = []
        for dataset in self.datasets:
            dataset.bind(place, num_workers, max_bad_fraction)
            dataset.leaves_normalising = True
            self._loaders.append(self._loader(dataset, batch_size, num_workers, prefetch_factor))

    def _loader(self, dataset, batch_size, num_workers, prefetch_factor):
        is_stream = isinstance(dataset, IterableDataset)
        return DataLoader(
            dataset,
            batch_size=dataset.batch_size or batch_size,
            sampler=None if is_stream else EndlessSampler(len(dataset), self._place),
            num_workers=num_workers,  # they live as long as the one endless iteration
            prefetch_factor=prefetch_factor if num_workers else None,
            pin_memory=torch.cuda.is_available(),
            collate_fn=_Collate(dataset),
            worker_init_fn=_outlive_the_trainer,
            generator=torch.Generator().manual_seed(self._place.seed),  # else it draws from the model's generator
        )

    def __iter__(self):
        return self

    def __next__(self):
        source = int(self._rng.choice(len(self.ratios), p=self.ratios)) if len(self.ratios) > 1 else 0
        try:
            if source not in self._iterators:
                self._iterators[source] = iter(self._loaders[source])
            batch = next(self._iterators[source])
        except DataError as error:
            message = str(error).rpartition("DataError: ")[2].strip()  # a worker's whole traceback stands before it
            error.__traceback__ = None  # it would keep the DataLoader alive, whose workers then take 5 s to stop
            self.close()
            raise DataError(message) from None
        name = self.datasets[source].name
        worker, *reached = batch.pop("progress")
        self._progress[name]["batches"] += 1
        self._progress[name]["workers"][worker] = reached
        return batch | {"sample_id": [f"{name}/{sample_id}" for sample_id in batch["sample_id"]]}

    def state(self):
        """Return what `resume` needs, as plain containers."""
        return {
            "seed": self._place.seed,
            "mixing": self._rng.bit_generator.state,
            "progress": {
                name: progress | {"workers": {**progress["workers"]}} for name, progress in self._progress.items()
            },
        }

    def resume(self, state):
        """Go on behind the last batch of a loader of the same settings whose `state()` this was; before the first."""
        self._rng.bit_generator.state = state["mixing"]
        for dataset, loader in zip(self.datasets, self._loaders, strict=True):
            self._progress[dataset.name] = progress = state["progress"][dataset.name]
            dataset.first_worker = progress["batches"] % max(1, loader.num_workers)
            for worker, (_, counts) in progress["workers"].items():
                dataset.skips.counts[worker] = torch.tensor(counts)
            if isinstance(dataset, IterableDataset):
                dataset.start = {worker: position for worker, (position, _) in progress["workers"].items()}
            else:
                loader.sampler.start = progress["batches"] * loader.batch_size

    def epoch_length(self):
        """Return the number of batches of this rank in a true pass over map-style data; None if there are shards."""
        if any(isinstance(dataset, IterableDataset) for dataset in self.datasets):
            return None
        cards = [loader.batch_size * self._place.world_size for loader in self._loaders]
        return sum(-(-len(dataset) // each) for dataset, each in zip(self.datasets, cards, strict=True))

    def skip_report(self):
        """Return {dataset: {"seen": samples met, reason: how many were skipped for it}} of the batches handed out."""
        counts = {name: [row for _, row in each["workers"].values()] for name, each in self._progress.items()}
        return {dataset.name: dataset.skips.report(counts[dataset.name]) for dataset in self.datasets}

    def close(self):
        """Stop the workers."""
        self._iterators.clear()


def _outlive_the_trainer(worker):
    """Keep a worker alive and silent whatever becomes of its trainer.

    It has a process group of its own, because torchrun sends SIGTERM to the whole group of the trainer, which then
    saves. And a trainer that is killed while it takes a batch breaks a connection of the thread that hands batches
    over; that thread would print a traceback, though all that is to be said is said by the ranks that are left.
    """
    os.setpgrp()
    sys.excepthook = _say_unless_the_trainer_is_gone


def _say_unless_the_trainer_is_gone(kind, error, traceback):
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)
