"""How the page's one model is shared: settings within bounds, a line of people, answers for those who listen."""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from typing import NamedTuple

from minigpt4.conversation.conversation import Chat, Conversation
from minigpt4.serving.session import Session, Turn

MOST_WAITING = 32  # people in the line
PATIENCE_S = 5.0  # an answer that nobody has listened to for so long is given up
RANDOM = -1  # seed


class Setting(NamedTuple):
    """A number that shapes answers: its bounds and first value, and what the page says about it."""

    least: float
    most: float
    first: float
    step: float
    label: str
    info: str


SETTINGS = {
    "temperature": Setting(0, 2, 1, 0.05, "Temperature", "0: always the same"),
    "top_p": Setting(0.05, 1, 0.9, 0.05, "Top-p", "1: any word"),
    "top_k": Setting(0, 200, 50, 1, "Top-k", "0: any word"),
    "num_beams": Setting(1, 10, 1, 1, "Beams", "1: word by word"),
    "max_new_tokens": Setting(1, 1000, 300, 1, "Longest answer", "tokens"),
    "repetition_penalty": Setting(1, 2, 1, 0.05, "Repetition penalty", "1: none"),
    "seed": Setting(RANDOM, 2**53, RANDOM, 1, "Seed", f"{RANDOM}: drawn anew"),
}


def checked(settings: dict[str, object]) -> dict[str, float | None]:
    """Return settings as Sampling takes them. Raises ValueError for what is no number or out of bounds."""
    numbers = {}
    for name, value in settings.items():
        setting = SETTINGS[name]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not setting.least <= value <= setting.most:  # NaN is within nothing
            bounds = f"from {setting.least} to {setting.most}"
            raise ValueError(f"{name}: {str(value)[:40]!r}; expected a number {bounds}")
        if setting.step == 1 and value != math.floor(value):
            raise ValueError(f"{name}: {value}; expected a whole number")
        numbers[name] = int(value) if setting.step == 1 else float(value)
    if numbers.get("seed") == RANDOM:
        numbers["seed"] = None
    return numbers


class LineFullError(ValueError):
    """Too many wait; `status` is HTTP's."""

    status = 429


class Line:
    """Those who wait for the model, in the order in which they came. Used by one event loop."""

    def __init__(self, most: int = MOST_WAITING):
        self.most, self._places = most, deque()

    def __len__(self) -> int:
        """How many wait or are being answered."""
        return len(self._places)

    @contextmanager
    def place(self) -> Iterator["Place"]:
        """Stand in line while the context lasts. Raises LineFullError when the line is full."""
        if len(self._places) > self.most:
            raise LineFullError(f"the line is full, {self.most} people wait: try again in a minute")
        place = Place(self._places)
        self._places.append(place)
        try:
            yield place
        finally:
            self._places.remove(place)
            for other in self._places:
                other.moved.set()


class Place:
    """One's place in a line."""

    def __init__(self, places: deque["Place"]):
        self._places, self.moved = places, asyncio.Event()

    @property
    def before(self) -> int:
        """How many come first."""
        return self._places.index(self)

    async def wait(self, seconds: float) -> None:
        """Return when the line has moved, or after `seconds`."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.moved.wait(), seconds)
        self.moved.clear()


class Listener:
    """Somebody who asked; `is_listening` tells whether they take what is sent to them."""

    def __init__(self, is_listening: Callable[[], bool]):
        self._is_listening, self._heard = is_listening, time.monotonic()

    def stay(self) -> bool:
        """Return whether they listen. Raises ConnectionError when they have not for long."""
        if is_listening := self._is_listening():
            self._heard = time.monotonic()
        if time.monotonic() - self._heard > PATIENCE_S:
            raise ConnectionError("nobody waits for this answer")
        return is_listening


class Answers:
    """The model of `chat` and its line; `template` is an empty Conversation."""

    def __init__(self, chat: Chat, template: Conversation):
        self.chat, self.template = chat, template
        self.line = Line()
        self.executor = ThreadPoolExecutor(1, "answers")  # one model, one answer at a time

    async def write(
        self,
        session: Session,
        turn: Turn,
        settings: dict,
        listener: Listener,
        on_notice: Callable[[str], None],
    ) -> AsyncIterator[int]:
        """Answer `turn`; yield again and again how many come before, in the end only 0.

        The answer grows in `turn`. Raises ValueError and OSError for what is refused, ConnectionError when the
        listener has left; then, and when the iterator is closed, the computation ends with its next token.
        """
        stop, notices = threading.Event(), deque()
        session.stop = stop
        with self.line.place() as place:
            # who stops or leaves while waiting, or never listens, costs the model nothing
            while place.before and not stop.is_set():
                yield place.before
                await place.wait(1)
                listener.stay()
            while not listener.stay():
                await asyncio.sleep(0.05)
            if stop.is_set():
                return
            # the thread writes into `turn`; the loop below looks how far it is
            shared = {"stop_event": stop, "on_notice": notices.append}
            pieces = session.stream(self.chat, self.template, turn, **shared, **settings)
            async with aclosing(in_thread(self.executor, lambda: deque(pieces, 0), stop)) as steps:
                async for _ in steps:
                    listener.stay()
                    yield 0
            for notice in notices:
                on_notice(notice)


async def in_thread(
    executor: Executor, work: Callable, stop: threading.Event
) -> AsyncIterator[None]:
    """Yield twenty times a second until `work()`, done by `executor`, ends; raise what it raised.

    However this ends, `stop` is set: `work` is expected to look at it.
    """
    job = asyncio.get_running_loop().run_in_executor(executor, work)
    try:
        while not (await asyncio.wait({job}, timeout=0.05))[0]:
            yield
        job.result()
    finally:
        stop.set()
        job.cancel()  # if it has not begun
