"""The model's one thread: waiting requests with the same settings are answered together, as a batch."""

import asyncio
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from minigpt4.conversation.answer_text import AnswerText
from minigpt4.conversation.chat import Chat
from minigpt4.conversation.context import Context
from minigpt4.conversation.conversation import Conversation
from minigpt4.conversation.decoding import decode_contexts, is_complete
from minigpt4.conversation.prefix_cache import PrefixCaches
from minigpt4.serving.answers import SETTINGS

MOST_EMBEDS = 64  # images whose embeddings are kept; with a 7B LLM one takes 256 KiB to 2 MiB

logger = logging.getLogger(__name__)


class Pixels(NamedTuple):
    """An image as the vision encoder reads it."""

    digest: bytes  # SHA-256 of the file, by which the same image is recognised
    values: Tensor  # float32 [3, S, S]


@dataclass(eq=False)
class Job:
    """A question to the model and its answer so far. It belongs to the event loop in which it is created.

    `settings` are fields of Sampling, "temperature" and "seed" among them. Set `stop` to end the answer with the token
    being computed.
    """

    conv: Conversation
    images: list[Pixels]
    settings: dict
    stop: threading.Event = field(default_factory=threading.Event)
    notices: list[str] = field(default_factory=list)
    context: Context | None = None  # from here on: set by Batches when it is being answered
    # all fields of Sampling; how long the answer may be is in `context`
    sampling: dict = field(default_factory=dict)
    answer: AnswerText | None = None
    num_cached: int = 0  # leading positions of the prompt that were in the KV cache
    is_complete: bool = False  # the answer ended by itself, not at its maximum length

    def __post_init__(self) -> None:
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue()

    @property
    def kind(self) -> object:
        """Jobs of equal kind may share a batch; one that is sampled with a seed has a kind of its own."""
        if self.settings["temperature"] > 0 and self.settings["seed"] is not None:
            return id(self)
        shared = {name: value for name, value in self.settings.items() if name != "max_new_tokens"}
        return self.conv.template.stop, sorted(shared.items(), key=str)

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the pieces of the answer's text. Raises what computing it raised."""
        while (event := await self._events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event

    def post(self, event: str | Exception | None) -> None:
        """Pass a piece, an error or the end (None) to `pieces`; may be called from any thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class Batches:
    """Answers jobs with the model of `chat`, in batches of at most `batch_size`, the oldest first."""

    def __init__(self, chat: Chat, batch_size: int):
        self.chat, self.batch_size = chat, batch_size
        self._waiting, self._changed = deque(), threading.Condition()
        self._is_closed = False
        # one tensor for each image: cached prefixes are compared by the identity of their images
        self._embeds, self._prefixes = OrderedDict(), PrefixCaches()
        self._running = []
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    def add(self, *jobs: Job) -> None:
        """Queue jobs, in this order."""
        with self._changed:
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """Stop the answers that are being computed, and end the thread."""
        with self._changed:
            self._is_closed = True
            for job in self._running:
                job.stop.set()
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            try:
                self._answer(batch)
            except Exception as error:
                logger.exception("a batch of %d failed", len(batch))
                for job in batch:
                    job.post(error)

    def _next(self) -> list[Job]:
        """Wait for jobs; return the oldest and others of its kind, nothing once closed."""
        with self._changed:
            while True:
                # drop the jobs whose client has left
                self._waiting = deque(job for job in self._waiting if not job.stop.is_set())
                if self._is_closed or self._waiting:
                    break
                self._changed.wait()
            if self._is_closed:
                return []
            kind = self._waiting[0].kind
            self._running = [job for job in self._waiting if job.kind == kind][: self.batch_size]
            for job in self._running:
                self._waiting.remove(job)
            return self._running

    def _answer(self, batch: list[Job]) -> None:
        jobs = [job for job in batch if self._prepare(job)]
        if not jobs:
            return
        # only a batch of one can reuse a cached prefix
        cache = None
        if len(jobs) == 1:
            cache = self._prefixes.best(jobs[0].context)
            jobs[0].num_cached = cache.common(jobs[0].context)
        contexts, stops = [job.context for job in jobs], [job.stop for job in jobs]
        with closing(
            decode_contexts(self.chat, contexts, cache, stops, **jobs[0].sampling)
        ) as steps:
            for step in steps:
                for row, token in step:
                    if piece := jobs[row].answer.add(token):
                        jobs[row].post(piece)
        for job in jobs:
            job.is_complete = is_complete(self.chat, job.context, job.answer.ids)
            if piece := job.answer.rest():
                job.post(piece)
            job.post(None)

    def _prepare(self, job: Job) -> bool:
        """Set a job's context, sampling and answer; return whether it can be answered. If not, the job gets the error."""
        # whether it fits is known before an image is encoded: by stand-ins without content
        width = self.chat.model.llama_model.get_input_embeddings().weight.shape[1]
        size = (1, self.chat.model.num_image_tokens, width)
        stand_ins = [torch.empty(size, device="meta") for _ in job.images]
        pixels = dict(zip(stand_ins, job.images, strict=True))
        try:
            # a longer answer takes the room that is left, but no old turn is left out for it
            longest, limit = job.settings["max_new_tokens"], self.chat.longest
            reserved = min(longest, SETTINGS["max_new_tokens"].first, limit // 2)
            settings = job.settings | {"max_new_tokens": reserved}
            prepared = self.chat.answer_prepare(
                job.conv, stand_ins, **settings, on_notice=job.notices.append
            )
            context = prepared.pop("context")
            images = tuple(self._embed(pixels[stand_in]) for stand_in in context.images)
        except (ValueError, OSError) as error:
            job.post(error)
            return False
        max_new_tokens = min(longest, limit - len(context.ids))
        job.context = replace(context, images=images, max_new_tokens=max_new_tokens)
        job.sampling = prepared
        job.answer = AnswerText(self.chat.model.llama_tokenizer, job.context.stop)
        return True

    def _embed(self, image: Pixels) -> Tensor:
        if image.digest not in self._embeds:
            # one by one, as the chat does, so that they equal the chat's bit for bit
            self._embeds[image.digest] = self.chat.encode_images([image.values])[0]
        self._embeds.move_to_end(image.digest)
        embeds = self._embeds[image.digest]
        while len(self._embeds) > MOST_EMBEDS:
            self._embeds.popitem(last=False)
        return embeds
