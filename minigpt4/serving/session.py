"""One person's dialogue, its questions, images and answers. Nothing else changes it."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakValueDictionary

from minigpt4.conversation.chat import Chat, PrefixCache
from minigpt4.conversation.conversation import Conversation
from minigpt4.conversation.images import open_image

MAX_IMAGES = 8  # of one message
MAX_PIXELS = 36_000_000  # of one image: 103 MiB while it is decoded
DEFAULT_QUESTION = "Describe this image in detail."


@dataclass(eq=False)
class Turn:
    """A question with its images, and the answer as far as it is written.

    `embeds`, a tensor [1, Q, H] an image, is what the LLM sees of them: encoded once, for `PrefixCache`
    knows a tensor again. None until they are needed.
    """

    text: str
    images: tuple[str, ...] = ()  # paths
    embeds: list | None = None
    answer: str = ""
    is_stopped: bool = False  # the answer ended early, by wish or because its reader left

    def __post_init__(self) -> None:
        # a lone surrogate breaks JSON
        self.text = str(self.text).encode("utf-8", "replace").decode()
        if self.images and not self.text.strip():
            self.text = DEFAULT_QUESTION

    def encode(self, chat: Chat) -> None:
        """Encode the images unless that is done. Raises ValueError that names the image."""
        if self.embeds is not None:
            return
        if len(self.images) > MAX_IMAGES:
            raise ValueError(f"{len(self.images)} images in one message; at most {MAX_IMAGES}")
        embeds = []
        for path in self.images:  # one by one: a batch would hold all of them decoded at once
            try:
                embeds += chat.encode_images([open_image(path, MAX_PIXELS)])
            except (ValueError, OSError) as error:  # a path on the server is nobody's business
                raise ValueError(str(error).replace(str(path), Path(path).name)) from error
        self.embeds = embeds


@dataclass(eq=False)
class Session:
    """The turns of a dialogue. Each answer builds a new Conversation of them, so edits are safe."""

    turns: list[Turn] = field(default_factory=list)
    pending: Turn | None = None  # asked, and waiting for the model
    cache: PrefixCache = field(default_factory=PrefixCache)
    is_waiting: bool = False  # an answer has been asked for, and is not complete
    is_busy: bool = False  # it is being computed
    stop: threading.Event | None = None  # of the answer that was begun last

    def stream(
        self, chat: Chat, template: Conversation, turn: Turn, **settings: object
    ) -> Iterator[str]:
        """Yield the pieces of the answer to `turn`, which joins the dialogue.

        `template` is an empty Conversation, `settings` are those of `Chat.stream_answer`. A turn that is refused
        (ValueError, OSError) or fails leaves the dialogue; one that is stopped stays with what was written.
        """
        self.is_busy, stop = True, settings.get("stop_event")
        try:
            turn.encode(chat)
            # the dialogue so far, then the question
            conv, embeds = template.copy(), []
            for told in self.turns:
                for _ in told.embeds:
                    conv.append_image()
                conv.append_question(told.text)
                conv.append_message(conv.roles[1], told.answer)
                embeds += told.embeds
            for _ in turn.embeds:
                conv.append_image()
            chat.ask(turn.text, conv)
            pieces = chat.stream_answer(conv, embeds + turn.embeds, cache=self.cache, **settings)
            turn.answer, turn.is_stopped = "", False
            self.turns.append(turn)
            with closing(pieces):
                for piece in pieces:
                    turn.answer += piece
                    yield piece
            turn.is_stopped = stop is not None and stop.is_set()
        except Exception:
            self.turns = [told for told in self.turns if told is not turn]
            raise
        finally:
            self.is_busy = False

    def edited(self, index: int, text: str) -> Turn:
        """Cut the dialogue before turn `index`; return that turn with another question, to be asked."""
        told = self.turns[index]
        del self.turns[index:]
        return Turn(text, told.images, told.embeds)

    def clear(self) -> None:
        """Forget everything."""
        self.turns, self.pending = [], None
        self.cache = PrefixCache()


class Sessions:
    """The dialogues of the page, the latest used last. A browser's tab finds its own again by a key.

    Keys and values are kept for the last `warm` only: at 7B and 2,000 tokens they are 1 GB each. More than
    `most` dialogues are not kept at all, nor older ones than `age_s` from their last answer.
    """

    def __init__(self, warm: int = 4, most: int = 200, age_s: float = 3600):
        self.warm, self.most = warm, most
        self.age_s = age_s
        self._used = {}  # session -> when
        self._by_key = WeakValueDictionary()

    def of(self, key: tuple) -> Session:
        """Return the session of a key, a new one if there is none."""
        session = self._by_key.get(key) or Session()
        self._by_key[key] = session
        return session

    def use(self, session: Session) -> None:
        """Count `session` as the latest; one that is no longer warm loses its cache, and is slower."""
        self._used.pop(session, None)
        self._used[session] = time.monotonic()
        for other in list(self._used)[: -self.warm]:
            other.cache = PrefixCache()
        self.forget_old()

    def forget(self, session: Session) -> None:
        """Free what a session holds."""
        session.clear()
        self._used.pop(session, None)

    def forget_old(self) -> None:
        """Forget what nobody has used for long, and the oldest of too many."""
        oldest = time.monotonic() - self.age_s
        too_many = list(self._used)[: -self.most]
        too_old = [session for session, used in self._used.items() if used < oldest]
        for session in {*too_many, *too_old}:
            self.forget(session)
