"""How clients share one model: settings within bounds, a queue, answers only for those that are still connected."""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from minigpt4.conversation.conversation import Chat, Conversation
from minigpt4.serving.session import Session, Turn

MOST_WAITING = 32  # requests in the queue
PATIENCE_S = 5.0  # an answer is abandoned when its client has been gone for so long
RANDOM = -1  # as a seed: a new one for each answer


class Setting(NamedTuple):
    """A setting of answers: its bounds, initial value and step, and its label and hint on the page."""

    least: float
    most: float
    first: float
    step: float
    label: str
    info: str


SETTINGS = {
    "temperature": Setting(0, 2, 1, 0.05, "Temperature", "0: always the same"),
    "top_p": Setting(0.05, 1, 0.9, 0.05, "Top-p", "1: no limit"),
    "top_k": Setting(0, 200, 50, 1, "Top-k", "0: no limit"),
    "num_beams": Setting(1, 10, 1, 1, "Beams", "1: no beam search"),
    "max_new_tokens": Setting(1, 1000, 300, 1, "Longest answer", "tokens"),
    "repetition_penalty": Setting(1, 2, 1, 0.05, "Repetition penalty", "1: none"),
    "seed": Setting(RANDOM, 2**53, RANDOM, 1, "Seed", f"{RANDOM}: random"),
}


def checked(settings: dict[str, object]) -> dict[str, float | None]:
    """Return settings as Sampling takes them. Raises ValueError for a value that is no number or out of bounds."""
    numbers = {}
    for name, value in settings.items():
        setting = SETTINGS[name]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not setting.least <= value <= setting.most:  # also refuses NaN
            bounds = f"from {setting.least} to {setting.most}"
            raise ValueError(f"{name}: {str(value)[:40]!r}; expected a number {bounds}")
        if setting.step == 1 and value != math.floor(value):
            raise ValueError(f"{name}: {value}; expected a whole number")
        numbers[name] = int(value) if setting.step == 1 else float(value)
    if numbers.get("seed") == RANDOM:
        numbers["seed"] = None
    return numbers


class QueueFullError(ValueError):
    """Too many requests wait; `status` is the HTTP status."""

    status = 429


class WaitingQueue:
    """The requests that wait for the model or are being answered, oldest first. Used by one event loop."""

    def __init__(self, most: int = MOST_WAITING):
        self.most, self._places = most, deque()

    def __len__(self) -> int:
        """The number of requests that wait or are being answered."""
        return len(self._places)

    @contextmanager
    def place(self) -> Iterator["Place"]:
        """Hold a place in the queue while the context lasts. Raises QueueFullError when it is full."""
        if len(self._places) > self.most:
            raise QueueFullError(
                f"the queue is full, {self.most} people are waiting: try again in a minute"
            )
        place = Place(self._places)
        self._places.append(place)
        try:
            yield place
        finally:
            self._places.remove(place)
            for other in self._places:
                other.moved.set()


class Place:
    """The place of one request in a WaitingQueue."""

    def __init__(self, places: deque["Place"]):
        self._places, self.moved = places, asyncio.Event()

    @property
    def num_ahead(self) -> int:
        """The number of requests that come first."""
        return self._places.index(self)

    async def wait(self, seconds: float) -> None:
        """Return when the queue has moved, or after `seconds`."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.moved.wait(), seconds)
        self.moved.clear()


class Listener:
    """The client that an answer is for; `is_connected` tells whether it receives what is sent."""

    def __init__(self, is_connected: Callable[[], bool]):
        self._is_connected, self._last_seen = is_connected, time.monotonic()

    def check(self) -> bool:
        """Return whether the client is connected. Raises ConnectionError after PATIENCE_S without it."""
        is_connected = self._is_connected()
        if is_connected:
            self._last_seen = time.monotonic()
        if time.monotonic() - self._last_seen > PATIENCE_S:
            raise ConnectionError("nobody waits for this answer")
        return is_connected


class Answers:
    """Answers the page's questions, one at a time, with the model of `chat`; `template` is an empty Conversation."""

    def __init__(self, chat: Chat, template: Conversation):
        self.chat, self.template = chat, template
        self.queue = WaitingQueue()
        self.executor = ThreadPoolExecutor(1, "answers")

    async def write(
        self,
        session: Session,
        turn: Turn,
        settings: dict,
        listener: Listener,
        on_notice: Callable[[str], None],
    ) -> AsyncIterator[int]:
        """Answer `turn`; yield repeatedly the number of requests ahead, which is 0 while it is being answered.

        The answer grows in `turn`. Raises ValueError or OSError for a question that is refused, ConnectionError when
        the client has left; then, and when the iterator is closed, the computation ends with its next token.
        """
        stop, notices = threading.Event(), deque()
        session.stop = stop
        with self.queue.place() as place:
            # whoever stops, leaves or never connects while waiting does not reach the model
            while place.num_ahead and not stop.is_set():
                yield place.num_ahead
                await place.wait(1)
                listener.check()
            while not listener.check():
                await asyncio.sleep(0.05)
            if stop.is_set():
                return
            # a thread runs the iterator to its end, which writes into `turn`; this loop waits for it
            hooks = {"stop_event": stop, "on_notice": notices.append}
            pieces = session.stream(self.chat, self.template, turn, **hooks, **settings)
            run_to_end = partial(_run_to_end, pieces, turn.images)
            async with aclosing(in_thread(self.executor, run_to_end, stop)) as steps:
                async for _ in steps:
                    listener.check()
                    yield 0
            for notice in notices:
                on_notice(notice)


def _run_to_end(pieces: Iterator[str], paths: Iterable[str]) -> None:
    """Exhaust `pieces`. Visitors must not see the server's folders: errors name the files of `paths` without them."""
    try:
        deque(pieces, maxlen=0)
    except (ValueError, OSError) as error:
        message = str(error)
        for path in paths:
            message = message.replace(path, Path(path).name)
        raise ValueError(message) from error


async def in_thread(
    executor: Executor, work: Callable, stop: threading.Event
) -> AsyncIterator[None]:
    """Run `work()` in `executor`; yield 20 times a second until it ends, and raise what it raised.

    `stop` is set however the iteration ends; `work` is expected to check it.
    """
    job = asyncio.get_running_loop().run_in_executor(executor, work)
    try:
        while not (await asyncio.wait({job}, timeout=0.05))[0]:
            yield
        job.result()
    finally:
        stop.set()
        job.cancel()  # if it has not begun
