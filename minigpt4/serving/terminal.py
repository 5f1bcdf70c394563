"""The chat in a terminal: one dialogue over lines of text, from a keyboard or from a pipe."""

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from minigpt4.common.utils import expand_path
from minigpt4.conversation.chat import Chat, Sampling
from minigpt4.conversation.conversation import Conversation
from minigpt4.serving.session import Session, Turn

HELP = """\
/image PATH      show an image; the next message is about it (give several for several)
/set NAME VALUE  e.g. temperature 0 (always the same answer), top_p, top_k, num_beams, max_new_tokens, seed
/reset           begin anew
/save FILE       write the dialogue as JSON
/help            this list
/quit            leave, as Ctrl-D does; Ctrl-C stops an answer"""


class Terminal:
    """A dialogue; `template` is an empty Conversation, `settings` are fields of Sampling."""

    def __init__(self, chat: Chat, template: Conversation, **settings: float):
        self.chat, self.template = chat, template
        self.settings, self.session = settings, Session()
        self.shown = Turn("", (), [])  # images of the next question
        self.commands = {
            "/image": self.show,
            "/set": self.set,
            "/reset": self.reset,
            "/save": self.save,
            "/help": lambda _: print(HELP),
        }

    def run(self) -> None:
        """Read lines until /quit or the end of the input; a mistake costs one line of output."""
        for stream in (sys.stdin, sys.stdout):
            stream.reconfigure(errors="replace")
        for line in _lines():
            name, rest = line.strip().partition(" ")[::2]
            if name == "/quit":
                return
            try:
                if not name.startswith("/"):
                    self.ask(line.strip())
                elif name in self.commands:
                    self.commands[name](rest.strip().strip("'\""))
                else:
                    raise ValueError(f"unknown command '{name}'; /help lists them")
            except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: out of memory
                print(f"error: {error}", file=sys.stderr, flush=True)

    def ask(self, text: str) -> None:
        """Print the answer to `text`, about the images shown since the last question, as it comes."""
        if not text and not self.shown.images:
            return
        turn = Turn(text, self.shown.images, self.shown.embeds)
        with _ctrl_c_sets() as stop:
            settings = {"stop_event": stop, "on_notice": partial(print, "note:", file=sys.stderr, flush=True)}
            for piece in self.session.stream(self.chat, self.template, turn, **settings, **self.settings):
                print(piece, end="", flush=True)
        print(" [stopped]" if stop.is_set() else "", flush=True)
        self.shown = Turn("", (), [])

    def show(self, path: str) -> None:
        """Encode an image for the next question."""
        path = str(expand_path(path)) if path else ""
        new = Turn("", (path,))
        new.encode(self.chat)
        self.shown.images += new.images
        self.shown.embeds += new.embeds
        print(f"{Path(path).name}: received")

    def set(self, text: str) -> None:
        """Change a setting of the answers to come."""
        name, value = text.partition(" ")[::2]
        if name not in Sampling.__dataclass_fields__:
            raise ValueError(f"/set: no setting '{name}'; there are {', '.join(Sampling.__dataclass_fields__)}")
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"/set: '{value}' is no number; write for example /set temperature 0.7") from None
        Sampling(**{**self.settings, name: value})  # refuses what is out of range
        self.settings[name] = value

    def reset(self, _: str = "") -> None:
        """Forget the dialogue; the settings stay."""
        self.session.clear()
        self.shown = Turn("", (), [])
        print("new dialogue")

    def save(self, path: str) -> None:
        """Write questions, images and answers."""
        if not path:
            raise ValueError("/save: give a file name, for example /save dialogue.json")
        turns = [{"question": t.text, "pictures": list(t.images), "answer": t.answer} for t in self.session.turns]
        content = {"settings": self.settings, "turns": turns}
        expand_path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{len(turns)} question(s) saved to {path}")


def _lines() -> Iterator[str]:
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D leaves)")


@contextmanager
def _ctrl_c_sets() -> Iterator[threading.Event]:
    """Yield a threading.Event that Ctrl-C sets; no KeyboardInterrupt ends the computation."""
    event = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
