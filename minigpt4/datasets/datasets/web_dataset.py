"""Image-caption pairs from tar shards: the one pipeline behind `laion`, `cc_sbu` and `webdataset`.

A consumer is one worker of one rank. In each epoch (a pass over the shards) it goes through these steps:

1. list the shards: files, folders, brace expansion, globs, lists of these; local paths, http(s) or object stores;
2. shuffle them: a permutation drawn from (seed, epoch), the same for all consumers;
3. take its share: of C consumers, number c reads the shards c, c + C, ... of that order. With fewer shards than
   consumers, each consumer reads all shards and keeps every C-th sample, so that none is without data. Either way
   the consumers together see each sample exactly once per epoch;
4. group the members of a tar: names that are equal up to the last dot form one raw sample. Nothing is decoded yet,
   and only images, `json` and `txt` are read, so a pickle in a shard is never opened;
5. shuffle raw samples in a buffer, seeded by (seed, epoch, consumer);
6. decode: image to RGB, caption from `json` (else `txt`); unusable samples are skipped and counted;
7. apply the processors, with augmentation seeded by (seed, epoch, shard, key).

The stream is endless unless `epochs` is given. A validation split is one pass in the order of the
shards, without steps 2 and 5. With `val_fraction`, step 4 keeps only the samples whose key belongs
to this split.

Resume: a stream's position is (epoch, raw samples drawn from the shuffle buffer), and every sample carries
its own under "stream". With `start[worker]` set to a position, the stream continues right after it: the
epoch's shards are read again up to that point, without decoding or counting anything.
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

from minigpt4.common.dist_utils import is_main_process
from minigpt4.common.utils import without_secrets
from minigpt4.datasets.datasets.base_dataset import BaseDataset, Place
from minigpt4.datasets.datasets.object_store import is_object, open_object
from minigpt4.datasets.datasets.record_text import read_members
from minigpt4.datasets.datasets.remote import open_url
from minigpt4.datasets.datasets.shard_cache import USES, ShardCache
from minigpt4.datasets.datasets.shard_list import expand_shards, is_address, open_file
from minigpt4.datasets.datasets.skips import DataError, SkipSample
from minigpt4.datasets.datasets.tar_members import tar_members
from minigpt4.datasets.datasets.tar_samples import (
    CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    TarSample,
    tar_samples,
)
from minigpt4.datasets.datasets.worker_status import worker_info
from minigpt4.processors import ImageError

SHUFFLE_BUFFER = 1000  # raw samples. Source: MiniGPT-4 2023
_SHUFFLE_INITIAL = 100  # samples in the buffer before one is drawn. Source: MiniGPT-4 2023
SHUFFLE_BYTES = 1 << 30  # per worker: of very large images the buffer holds fewer


class RawSample(NamedTuple):
    """The undecoded members of one key of a tar. `members`: extension -> bytes; `extensions`: all that exist."""

    shard: str
    key: str
    members: dict
    extensions: tuple

    def size(self) -> int:
        """Return the number of bytes of its members."""
        return sum(map(len, self.members.values()))


def read_caption(raw: RawSample) -> str | tuple[tuple[str, str], ...]:
    """Return the caption of a raw sample, or the (question, answer) pairs of its conversation.

    Text in `json` takes precedence over `txt`. Raises SkipSample if there is no text.
    """
    if not raw.members.keys() & set(CAPTION_EXTENSIONS):
        raise SkipSample("no_caption", ", ".join(raw.extensions))
    return read_members(raw.members)


def read_image(raw: RawSample, load: Callable[[bytes], Image.Image]) -> Image.Image:
    """Return the image of a raw sample, decoded by `load`. Raises SkipSample if it has none or a broken one."""
    extensions = [extension for extension in IMAGE_EXTENSIONS if extension in raw.members]
    if not extensions:
        raise SkipSample("no_image", ", ".join(raw.extensions))
    try:
        return load(raw.members[extensions[0]])
    except ImageError as error:
        raise SkipSample("bad_image", str(error)) from error


class WebCaptionDataset(BaseDataset, IterableDataset):
    """Yields {"image", "text_input", "sample_id", "stream"} endlessly, or for `epochs` passes.

    Samples with a conversation also have "turns". `shard_cache` keeps remote shards on disk; `cache_use` counts what
    became of them, one row per worker with the columns of USES.
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
        if is_main_process() and (repeated := len(self.shards) - len(set(self.shards))):
            logging.warning(
                f"{name}: {repeated} of {len(self.shards)} shards are named more than once and read as often"
            )
        self.epochs = epochs
        self.start = {}  # worker -> (epoch, raw samples drawn): the position after which its stream resumes
        super().__init__(vis_processor, text_processor, name=name)

    def bind(self, place: Place, num_workers: int = 0, max_bad_fraction: float = 0.05) -> None:
        super().bind(place, num_workers, max_bad_fraction)
        workers = max(1, num_workers)
        self.cache_use = torch.zeros(workers, len(USES), dtype=torch.int64).share_memory_()
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
        worker, num_workers = worker_info()
        consumer = self.place.rank * num_workers + worker
        consumers = self.place.world_size * num_workers
        first_epoch, already_drawn = self.start.get(worker, (0, 0))
        epochs = count(first_epoch) if self.epochs is None else range(first_epoch, self.epochs)
        for epoch in epochs:
            raw_samples = enumerate(self._raw_samples(epoch, consumer, consumers), start=1)
            # after a resume: read up to the position without counting what was counted before
            self.skips.is_counting = False
            deque(islice(raw_samples, already_drawn), maxlen=0)
            self.skips.is_counting = True

            has_yielded = already_drawn > 0
            for drawn, raw in raw_samples:
                if sample := self.usable(raw, epoch):
                    has_yielded = True
                    yield sample | {"stream": (epoch, drawn)}
            already_drawn = 0
            # else an endless stream without a usable sample would loop forever
            if not has_yielded:
                self._check_any_usable()

    def one_pass(self) -> Iterator[dict]:
        """Yield each usable sample once, in the order of training's first epoch on one process; count the rest."""
        for raw in self._raw_samples(0, 0, 1):
            if sample := self.usable(raw, epoch=0):
                yield sample

    def _raw_samples(self, epoch: int, consumer: int, consumers: int) -> Iterator[RawSample]:
        """Return this consumer's raw samples of an epoch, in their final order."""
        if self.is_val:
            return self._share(self.shards, epoch, consumer, consumers)
        order = np.random.default_rng([self.place.seed, epoch]).permutation(len(self.shards))
        share = self._share([self.shards[shard] for shard in order], epoch, consumer, consumers)
        rng = random.Random(f"{self.place.seed}/{epoch}/{consumer}")
        return shuffled(share, rng)

    def _share(
        self, shards: list[str], epoch: int, consumer: int, consumers: int
    ) -> Iterator[RawSample]:
        """Yield this consumer's raw samples: whole shards, or every `consumers`-th sample of all shards."""
        if len(shards) >= consumers:
            for shard in shards[consumer::consumers]:
                yield from self._read_shard(shard)
            return
        # Numbers start from the epoch, so that with very few samples each consumer gets different ones every epoch.
        for position, shard in enumerate(shards):
            is_mine = position % consumers == consumer  # one consumer counts a shard's own faults
            for number, raw in enumerate(self._read_shard(shard, is_mine), start=position + epoch):
                if number % consumers == consumer:
                    yield raw

    def _read_shard(self, shard: str, counted: bool = True) -> Iterator[RawSample]:
        """Yield this split's raw samples of a tar; a missing, empty or damaged tar is counted and ends early."""
        num_read = 0
        worker, _ = worker_info()
        self.worker_status.set_shard(worker, self.shards.index(shard))
        try:
            with self._opened(shard) as file:
                for sample in tar_samples(tar_members(file, IMAGE_EXTENSIONS + CAPTION_EXTENSIONS)):
                    num_read += 1
                    if not self.skips.is_counting:
                        self.worker_status.count_fast_forwarded(worker)
                    if self.holds(sample.key):
                        yield _raw_sample(shard, sample)
                    elif counted and not self.is_val:
                        self.skips.held_out()
            if not num_read:
                raise ValueError("the shard is empty")
        except Exception as error:  # curl, fsspec and the file system raise almost anything
            if counted:
                name = without_secrets(shard)
                read = f"; samples read of it: {num_read:,}, none behind that" if num_read else ""
                detail = f"{type(error).__name__}: {error}{read}".replace(shard, name)
                self.skips.skip("bad_shard", name, detail)

    def _opened(self, shard: str) -> AbstractContextManager:
        if not is_address(shard):
            return open_file(shard)
        fetch = open_object if is_object(shard) else open_url
        if self.shard_cache:
            return self.shard_cache.opened(shard, fetch, self._count_cache_use)
        return fetch(shard)

    def cache_counts(self) -> dict[str, int]:
        """Return how often a shard was read from the cache, added to it, or not kept; over all workers."""
        return dict(zip(USES, self.cache_use.sum(0).tolist(), strict=True))

    def _count_cache_use(self, use: int, reason: str) -> None:
        row = self.cache_use[worker_info()[0]]
        row[use] += 1
        if reason and row[use] == 1:
            message = (
                "%s: a shard could not be kept in run.shard_cache (%s), and is read as it comes; %s"
            )
            logging.warning(message, self.name, reason, "more of these are only counted")

    def load(self, raw: RawSample, epoch: int) -> dict:
        image, caption = read_image(raw, self.load_image), read_caption(raw)
        sample = self.prepare(image, caption, epoch, raw.shard, raw.key)
        return sample | {"sample_id": f"{raw.shard}/{raw.key}"}

    def label_of(self, raw: RawSample) -> str:
        return f"{raw.shard} {raw.key}"

    def _check_any_usable(self) -> None:
        """Raise DataError unless some shard has a usable sample, which may be in this consumer's next share."""
        for shard in self.shards:
            for raw in self._read_shard(shard, counted=False):
                try:
                    self.load(raw, epoch=0)
                    return
                except SkipSample:
                    continue
        if self.is_val and self.val_fraction and not self.skips.report()["seen"]:
            raise DataError(
                f"{self.name}: val_fraction {self.val_fraction} holds out none of the samples; raise it, or name files "
                "of their own by val"
            )
        raise self.skips.nothing_usable()


def shuffled(samples: Iterator[RawSample], rng: random.Random) -> Iterator[RawSample]:
    """Yield samples in an order drawn by `rng` from a buffer, as webdataset's `shuffle(1000, initial=100)` does."""
    buffer, num_bytes = [], 0
    for sample in samples:
        new = [sample]
        if len(buffer) + 1 < SHUFFLE_BUFFER:  # two in, one out: the buffer grows until it is full
            new += islice(samples, 1)
        buffer += new
        num_bytes += sum(raw.size() for raw in new)
        # one sample leaves once the buffer is initialised; more if it takes too much memory
        is_due = len(buffer) >= _SHUFFLE_INITIAL
        while is_due or num_bytes > SHUFFLE_BYTES:
            drawn = _pop_random(buffer, rng)
            num_bytes -= drawn.size()
            yield drawn
            is_due = False
    while buffer:
        yield _pop_random(buffer, rng)


def _pop_random(buffer: list[RawSample], rng: random.Random) -> RawSample:
    """Remove a random sample from the buffer and return it; the last sample moves into its position."""
    index = rng.randint(0, len(buffer) - 1)
    buffer[index], drawn = buffer[-1], buffer[index]
    buffer.pop()
    return drawn


def _file_name(shard: str) -> str:
    return without_secrets(shard).rsplit("/", 1)[-1]


def _raw_sample(shard: str, sample: TarSample) -> RawSample:
    return RawSample(_file_name(shard), sample.key, sample.members, sample.found())
