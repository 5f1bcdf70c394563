"""One user's dialogue: its questions, images and answers."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from minigpt4.conversation.chat import Chat, PrefixCache
from minigpt4.conversation.conversation import Conversation
from minigpt4.conversation.images import open_image

MAX_IMAGES = 8  # of one message
MAX_PIXELS = 36_000_000  # of one image, which takes 103 MiB while it is decoded
DEFAULT_QUESTION = "Describe this image in detail."


@dataclass(eq=False)
class Turn:
    """A question with its images, and the answer so far.

    `embeds` are the embeddings [1, Q, D] of the images, None until they are needed. They are encoded
    only once: `PrefixCache` recognises an image by the identity of its tensor.
    """

    text: str
    images: tuple[str, ...] = ()  # paths
    embeds: list | None = None
    answer: str = ""
    is_stopped: bool = False  # the answer ended early: the user stopped it or left

    def __post_init__(self) -> None:
        # a lone surrogate cannot be sent as JSON
        self.text = str(self.text).encode("utf-8", "replace").decode()
        if self.images and not self.text.strip():
            self.text = DEFAULT_QUESTION

    def encode(self, chat: Chat) -> None:
        """Encode the images, unless that has been done. Raises ValueError or OSError that names the image's path."""
        if self.embeds is not None:
            return
        if len(self.images) > MAX_IMAGES:
            raise ValueError(f"{len(self.images)} images in one message; at most {MAX_IMAGES}")
        embeds = []
        for path in self.images:  # one by one: a batch would hold all of them decoded
            embeds += chat.encode_images([open_image(path, MAX_PIXELS)])
        self.embeds = embeds


@dataclass(eq=False)
class Session:
    """The turns of a dialogue. Each answer builds a new Conversation from them, so they may be edited."""

    turns: list[Turn] = field(default_factory=list)
    pending: Turn | None = None  # a question that has not been answered yet
    asked: Turn | None = None  # the last one that was passed on to be answered, until that ends
    cache: PrefixCache = field(default_factory=PrefixCache)
    is_busy: bool = False  # an answer is being computed
    stop: threading.Event | None = None  # stops the answer that was begun last

    def stream(
        self, chat: Chat, template: Conversation, turn: Turn, **settings: object
    ) -> Iterator[str]:
        """Add `turn` to the dialogue and yield the pieces of its answer.

        `template` is an empty Conversation, `settings` are those of `Chat.stream_answer`. A turn that is refused
        (ValueError, OSError) or fails is removed again; one that is stopped stays, with the answer so far.
        """
        self.is_busy, stop = True, settings.get("stop_event")
        try:
            turn.encode(chat)
            if stop is not None and stop.is_set():
                return
            # the dialogue so far, then the question
            conv, embeds = template.copy(), []
            for earlier in self.turns:
                for _ in earlier.embeds:
                    conv.append_image()
                conv.append_question(earlier.text)
                conv.append_message(conv.roles[1], earlier.answer)
                embeds += earlier.embeds
            for _ in turn.embeds:
                conv.append_image()
            chat.ask(turn.text, conv)
            pieces = chat.stream_answer(conv, embeds + turn.embeds, cache=self.cache, **settings)
            if stop is not None and stop.is_set():  # `edited` meanwhile
                return
            turn.answer, turn.is_stopped = "", False
            self.turns.append(turn)
            with closing(pieces):
                for piece in pieces:
                    turn.answer += piece
                    yield piece
            turn.is_stopped = stop is not None and stop.is_set()
        except Exception:
            self.turns = [other for other in self.turns if other is not turn]
            raise
        finally:
            self.is_busy = False

    def edited(self, index: int, text: str) -> Turn:
        """Remove turn `index` and all later ones; return that turn with the question `text`, not yet asked.

        An answer that is waited for or being written ends, and its question is dropped.
        """
        if self.stop is not None:
            self.stop.set()
        self.asked, old = None, self.turns[index]
        del self.turns[index:]
        return Turn(text, old.images, old.embeds)

    def clear(self) -> None:
        """Forget everything."""
        self.turns, self.pending = [], None
        self.cache = PrefixCache()


class Sessions:
    """The dialogues of the page, from the least to the most recently used. A browser tab finds its own by a key.

    Only the last `warm` keep their KV caches, which take 1 GB each with a 7B LLM and 2,000 tokens. Of the dialogues at
    most `most` are kept, none longer than `age_s` after its last answer.
    """

    def __init__(self, warm: int = 4, most: int = 200, age_s: float = 3600):
        self.warm, self.most = warm, most
        self.age_s = age_s
        self._used = {}  # session -> time of its last use
        self._by_key = WeakValueDictionary()

    def of(self, key: tuple) -> Session:
        """Return the session of a key; a new one if there is none."""
        session = self._by_key.get(key) or Session()
        self._by_key[key] = session
        return session

    def use(self, session: Session) -> None:
        """Mark `session` as used now; those that are no longer warm lose their KV caches, which only makes them slower."""
        self._used.pop(session, None)
        self._used[session] = time.monotonic()
        for other in list(self._used)[: -self.warm]:
            other.cache = PrefixCache()
        self.forget_old()

    def forget(self, session: Session) -> None:
        """Clear a session, and keep it no longer."""
        session.clear()
        self._used.pop(session, None)

    def forget_old(self) -> None:
        """Forget the sessions that were not used for `age_s`, and the oldest beyond `most`."""
        oldest = time.monotonic() - self.age_s
        too_many = list(self._used)[: -self.most]
        too_old = [session for session, used in self._used.items() if used < oldest]
        for session in {*too_many, *too_old}:
            self.forget(session)
