"""The model's one thread: requests that wait and are decoded alike are answered in one batch, token by token."""

import asyncio
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from minigpt4.conversation.answer_text import AnswerText
from minigpt4.conversation.chat import Chat
from minigpt4.conversation.context import Context
from minigpt4.conversation.conversation import Conversation
from minigpt4.conversation.decoding import decode_contexts, is_complete
from minigpt4.conversation.prefix_cache import PrefixCaches

MOST_EMBEDS = 64  # images whose embeddings are kept; at 7B one takes 256 KiB to 2 MiB

logger = logging.getLogger(__name__)


class Pixels(NamedTuple):
    """An image as the vision encoder reads it."""

    digest: bytes  # of the file: the same image has the same
    values: Tensor  # float32 [3, S, S]


@dataclass(eq=False)
class Job:
    """A question to the model and, as it is written, its answer. Belongs to the event loop that makes it.

    `settings` are fields of Sampling, "temperature" and "seed" among them. Set `stop` to end the answer with the token
    being computed.
    """

    conv: Conversation
    images: list[Pixels]
    settings: dict
    stop: threading.Event = field(default_factory=threading.Event)
    notices: list[str] = field(default_factory=list)
    context: Context | None = None  # from here on: known once it is being answered
    # `settings` and the model's own; the limit is the context's
    sampling: dict = field(default_factory=dict)
    answer: AnswerText | None = None
    num_cached: int = 0  # positions of the prompt that were not computed anew
    is_complete: bool = False  # it ended by itself

    def __post_init__(self) -> None:
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue()

    @property
    def kind(self) -> object:
        """What jobs of one batch have in common; one that draws by a seed of its own is alone."""
        alike = {name: value for name, value in self.settings.items() if name != "max_new_tokens"}
        is_drawn = self.settings["temperature"] > 0 and self.settings["seed"] is not None
        return id(self) if is_drawn else (self.conv.template.stop, sorted(alike.items(), key=str))

    async def pieces(self) -> AsyncIterator[str]:
        """Yield the pieces of the answer's text. Raises what computing it raised."""
        while (event := await self._events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event

    def post(self, event: str | Exception | None) -> None:
        """Hand a piece, an error or the end to `pieces`, from any thread."""
        with suppress(RuntimeError):  # the loop has closed: nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class Batches:
    """Answers jobs with the model of `chat`, at most `batch_size` at once, the oldest first."""

    def __init__(self, chat: Chat, batch_size: int):
        self.chat, self.batch_size = chat, batch_size
        self._waiting, self._changed = deque(), threading.Condition()
        self._is_closed = False
        # an image's embedding is one object for as long as it is kept: prefixes are compared by it
        self._embeds, self._prefixes = OrderedDict(), PrefixCaches()
        self._running = []
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    def add(self, *jobs: Job) -> None:
        """Let jobs wait for their answers, in this order."""
        with self._changed:
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """End what is being answered, and the thread."""
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
        """Return the job that has waited longest, and others of its kind; nothing once closed."""
        with self._changed:
            while True:
                # who has left costs the model nothing
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
        # a prefix is reused where there is nobody to share a batch with
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
        """Make a job's context; return whether it can be answered. One that cannot says so itself."""
        try:
            images = [self._embed(image) for image in job.images]
            prepared = self.chat.answer_prepare(
                job.conv, images, **job.settings, on_notice=job.notices.append
            )
        except (ValueError, OSError) as error:
            job.post(error)
            return False
        job.context = prepared.pop("context")
        job.sampling = prepared
        job.answer = AnswerText(self.chat.model.llama_tokenizer, job.context.stop)
        return True

    def _embed(self, image: Pixels) -> Tensor:
        if image.digest not in self._embeds:
            # one by one, as the chat does it: to the bit the same
            self._embeds[image.digest] = self.chat.encode_images([image.values])[0]
        self._embeds.move_to_end(image.digest)
        embeds = self._embeds[image.digest]
        while len(self._embeds) > MOST_EMBEDS:
            self._embeds.popitem(last=False)
        return embeds
