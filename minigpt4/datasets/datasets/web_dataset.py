"""Image-caption pairs from tar shards: the one pipeline behind `laion` and `cc_sbu`.

One pass ("epoch") of one consumer, where a consumer is a worker of a rank:

1. the shard list: files, folders, brace expansion, globs, lists of these; local paths, http(s) or object stores;
2. the order of shards: a permutation drawn from (seed, epoch), equal for all consumers;
3. the deal: of C consumers, number c takes the shards c, c + C, ... of that order. With fewer shards than consumers
   each one walks all shards and takes every C-th sample, so that none is without data. Either way the consumers
   together meet each sample exactly once an epoch;
4. members of a tar whose names are equal up to the last dot form one raw sample; nothing is decoded yet, and only
   images, `json` and `txt` are read, so nobody looks at a pickle in a shard;
5. a shuffle buffer drawn from (seed, epoch, consumer);
6. decoding: image to RGB, caption from `json` (else `txt`); what is unusable is skipped and counted;
7. the processors, augmentation seeded by (seed, epoch, shard, key).

Then the next epoch begins: the stream has no end unless `epochs` is given. A validation split is
one pass in the order of the shards, without 2 and 5; with `val_fraction` step 4 takes the samples
whose key is of this split.

A stream's position is (epoch, raw samples drawn from the shuffle buffer), and every sample carries
it under "stream". Set `start[worker]` to such a position and the stream resumes right behind it:
the epoch's shards are read again up to there, and nothing of that is decoded or counted.
"""

import logging
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from minigpt4.common.utils import without_secrets
from minigpt4.datasets.datasets.base_dataset import BaseDataset, Place
from minigpt4.datasets.datasets.object_store import is_object, open_object
from minigpt4.datasets.datasets.record_text import read_members
from minigpt4.datasets.datasets.remote import open_url
from minigpt4.datasets.datasets.shard_cache import USES, ShardCache
from minigpt4.datasets.datasets.shard_list import expand_shards, is_address, open_file
from minigpt4.datasets.datasets.skips import SkipSample
from minigpt4.datasets.datasets.tar_members import tar_members
from minigpt4.datasets.datasets.tar_samples import (
    CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    TarSample,
    tar_samples,
)
from minigpt4.datasets.datasets.whereabouts import worker_place
from minigpt4.processors import ImageError

SHUFFLE_BUFFER = 1000  # raw samples; handed out from the 100th on. Source: MiniGPT-4 2023
SHUFFLE_BYTES = 1 << 30  # of a worker: with images of many megabytes the buffer holds fewer


class RawSample(NamedTuple):
    """The members of one key of a tar, undecoded: `members` extension -> bytes; `extensions` all that were there."""

    shard: str
    key: str
    members: dict
    extensions: tuple

    def size(self) -> int:
        """Return the number of bytes of its members."""
        return sum(map(len, self.members.values()))


def read_caption(raw: RawSample) -> str | tuple[tuple[str, str], ...]:
    """Return the caption of a raw sample, or the (question, answer) pairs of its conversation.

    `json` goes before `txt` where it has either. Raises SkipSample if there is no text.
    """
    if not raw.members.keys() & set(CAPTION_EXTENSIONS):
        raise SkipSample("no_caption", ", ".join(raw.extensions))
    return read_members(raw.members)


def read_image(raw: RawSample, load: Callable[[bytes], Image.Image]) -> Image.Image:
    """Return the image of a raw sample as RGB, made by `load`. Raises SkipSample if none can be decoded."""
    extension = next(
        (extension for extension in IMAGE_EXTENSIONS if extension in raw.members), None
    )
    if extension is None:
        raise SkipSample("no_image", ", ".join(raw.extensions))
    try:
        return load(raw.members[extension])
    except ImageError as error:
        raise SkipSample("bad_image", str(error)) from error


class WebCaptionDataset(BaseDataset, IterableDataset):
    """Yields {"image", "text_input", "sample_id", "stream"} without end, or for `epochs` passes.

    Samples with a conversation have "turns" too. `shard_cache` keeps shards that are not local; what became of them is
    counted in `cache_use`, one row of USES a worker.
    """

    shard_cache: ShardCache | None = None

    def __init__(
        self,
        location: str | Iterable[str],
        vis_processor: Any,
        text_processor: Any = None,
        name: str = "webdataset",
        epochs: int | None = None,
    ):
        self.shards = expand_shards(location)
        if not self.shards:
            raise FileNotFoundError(f"{name}: no file matches '{location}'")
        self.epochs = epochs
        self.start = {}  # worker -> (epoch, raw samples drawn) after which its stream resumes
        super().__init__(vis_processor, text_processor, name=name)

    def bind(self, place: Place, num_workers: int = 0, max_bad_fraction: float = 0.05) -> None:
        super().bind(place, num_workers, max_bad_fraction)
        self.cache_use = torch.zeros(
            max(1, num_workers), len(USES), dtype=torch.int64
        ).share_memory_()
        workers = max(1, num_workers)
        if place.rank == 0 and len(self.shards) < place.world_size * workers:
            logging.info(
                f"{self.name}: {len(self.shards)} shard(s) for {place.world_size} rank(s) x {workers} worker(s): each "
                f"worker walks all shards and takes one sample in {place.world_size * workers}"
            )

    def set_split(self, is_val: bool, val_fraction: float | None = None) -> None:
        super().set_split(is_val, val_fraction)
        self.epochs = 1 if is_val else self.epochs

    def listing(self) -> list[str]:
        return [_file_name(shard) for shard in self.shards]

    def __iter__(self) -> Iterator[dict]:
        worker, num_workers = worker_place()
        consumer = (self.place.rank * num_workers + worker, self.place.world_size * num_workers)
        first_epoch, already_drawn = self.start.get(worker, (0, 0))
        for epoch in count(first_epoch) if self.epochs is None else range(first_epoch, self.epochs):
            fruitful = already_drawn > 0
            raw_samples = enumerate(self._raw_samples(epoch, *consumer), start=1)
            self.skips.is_counting = False
            deque(islice(raw_samples, already_drawn), maxlen=0)
            self.skips.is_counting = True
            for drawn, raw in raw_samples:
                if sample := self.usable(raw, epoch):
                    fruitful = True
                    yield sample | {"stream": (epoch, drawn)}
            already_drawn = 0
            if not fruitful:
                self._find_a_usable_sample()

    def one_pass(self) -> Iterator[dict]:
        """Yield each usable sample once, in the order of training's first epoch on one process; count the others."""
        for raw in self._raw_samples(0, 0, 1):
            if sample := self.usable(raw, epoch=0):
                yield sample

    def _raw_samples(self, epoch: int, consumer: int, consumers: int) -> Iterator[RawSample]:
        if self.is_val:
            return self._deal(self.shards, epoch, consumer, consumers)
        order = np.random.default_rng([self.place.seed, epoch]).permutation(len(self.shards))
        dealt = self._deal([self.shards[shard] for shard in order], epoch, consumer, consumers)
        rng = random.Random(f"{self.place.seed}/{epoch}/{consumer}")
        return shuffled(dealt, rng)

    def _deal(
        self, shards: list[str], epoch: int, consumer: int, consumers: int
    ) -> Iterator[RawSample]:
        if len(shards) >= consumers:
            for shard in shards[consumer::consumers]:
                yield from self._read(shard)
            return
        # the epoch rotates who gets what of a set smaller than its consumers
        for position, shard in enumerate(shards):
            is_mine = position % consumers == consumer  # a shard's own faults are counted once
            for number, raw in enumerate(self._read(shard, is_mine), start=position + epoch):
                if number % consumers == consumer:
                    yield raw

    def _read(self, shard: str, counted: bool = True) -> Iterator[RawSample]:
        """Yield this split's raw samples of a tar; one that is missing, empty or damaged is counted and ends."""
        found = 0
        worker, _ = worker_place()
        self.whereabouts.reads(worker, self.shards.index(shard))
        try:
            with self._opened(shard) as file:
                for sample in tar_samples(tar_members(file, IMAGE_EXTENSIONS + CAPTION_EXTENSIONS)):
                    found += 1
                    if not self.skips.is_counting:
                        self.whereabouts.pass_by(worker)
                    if self.holds(sample.key):
                        yield _raw_sample(shard, sample)
                    elif counted and not self.is_val:
                        self.skips.held_out()
            if not found:
                raise ValueError("the shard is empty")
        except Exception as error:  # curl, fsspec and the file system raise almost anything
            if counted:
                name = without_secrets(shard)
                read = f"; samples read of it: {found:,}, none behind that" if found else ""
                self.skips.skip(
                    "bad_shard", name, f"{type(error).__name__}: {error}{read}".replace(shard, name)
                )

    def _opened(self, shard: str) -> AbstractContextManager:
        if not is_address(shard):
            return open_file(shard)
        fetch = open_object if is_object(shard) else open_url
        return (
            self.shard_cache.opened(shard, fetch, self._note_cache_use)
            if self.shard_cache
            else fetch(shard)
        )

    def cache_counts(self) -> dict[str, int]:
        """Return how many shards were read from the cache, kept in it, or not; all workers together."""
        return dict(zip(USES, self.cache_use.sum(0).tolist(), strict=True))

    def _note_cache_use(self, use: int, why: str) -> None:
        row = self.cache_use[worker_place()[0]]
        row[use] += 1
        if why and row[use] == 1:
            message = (
                "%s: a shard could not be kept in run.shard_cache (%s), and is read as it comes; %s"
            )
            logging.warning(message, self.name, why, "more of these are only counted")

    def load(self, raw: RawSample, epoch: int) -> dict:
        image, caption = read_image(raw, self.load_image), read_caption(raw)
        sample = self.prepare(image, caption, epoch, raw.shard, raw.key)
        return sample | {"sample_id": f"{raw.shard}/{raw.key}"}

    def label_of(self, raw: RawSample) -> str:
        return f"{raw.shard} {raw.key}"

    def _find_a_usable_sample(self) -> None:
        """Raise DataError if no shard holds one: else this consumer was unlucky, and its next epoch is dealt anew."""
        for shard in self.shards:
            for raw in self._read(shard, counted=False):
                try:
                    self.load(raw, epoch=0)
                    return
                except SkipSample:
                    continue
        raise self.skips.nothing_usable()


def shuffled(samples: Iterator[RawSample], rng: random.Random) -> Iterator[RawSample]:
    """Yield samples in an order drawn by `rng` from a buffer, as webdataset's `shuffle(1000, initial=100)` does."""
    buffer, size = [], 0
    for sample in samples:
        # until it is full the buffer grows by one each time
        new = [sample, *islice(samples, int(len(buffer) + 1 < SHUFFLE_BUFFER))]
        buffer += new
        size += sum(each.size() for each in new)
        is_due = len(buffer) >= 100
        while is_due or size > SHUFFLE_BYTES:
            taken = _pick(buffer, rng)
            size -= taken.size()
            yield taken
            is_due = False
    while buffer:
        yield _pick(buffer, rng)


def _pick(buffer: list[RawSample], rng: random.Random) -> RawSample:
    """Return a sample drawn from the buffer; the last one takes its place."""
    place = rng.randint(0, len(buffer) - 1)
    buffer[place], taken = buffer[-1], buffer[place]
    buffer.pop()
    return taken


def _file_name(shard: str) -> str:
    return without_secrets(shard).rsplit("/", 1)[-1]


def _raw_sample(shard: str, sample: TarSample) -> RawSample:
    return RawSample(_file_name(shard), sample.key, sample.members, sample.found())
