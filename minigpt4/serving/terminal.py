"""The chat in a terminal: one dialogue, its messages read line by line from a keyboard or a pipe.

At a keyboard, lines can be edited and recalled, Tab completes commands and paths, and pasted text is one message.
"""

import glob
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from minigpt4.common.utils import expand_path, printable
from minigpt4.conversation.chat import Chat, Sampling
from minigpt4.conversation.conversation import Conversation
from minigpt4.serving.session import Session, Turn

HELP = '''\
/image PATH      show an image; the next message is about it (repeat it for several images)
/set NAME VALUE  e.g. temperature 0 (always the same answer), top_p, top_k, num_beams, max_new_tokens, seed
/reset           start a new dialogue
/save FILE       write the dialogue as JSON
/help            this list
/quit            leave (also Ctrl-D); Ctrl-C stops an answer
"""              starts and ends a message of several lines'''
GREETING = "/image PATH shows an image, then ask about it; /help lists all commands, Ctrl-D leaves"
BLOCK = '"""'


class Terminal:
    """A dialogue; `template` is an empty Conversation, `settings` are fields of Sampling."""

    def __init__(self, chat: Chat, template: Conversation, **settings: float):
        self.chat, self.template = chat, template
        self.settings, self.session = settings, Session()
        self.shown = Turn("", (), [])  # holds the images of the next question
        self.commands = {
            "/image": self.show,
            "/set": self.set,
            "/reset": self.reset,
            "/save": self.save,
            "/help": lambda _: print(HELP),
        }

    def run(self) -> int:
        """Read messages until /quit or the end of the input; report errors in one line and go on.

        Return the exit code, which in a pipe is 1 if a message failed and 130 after Ctrl-C.
        """
        sys.stdin.reconfigure(errors="surrogateescape")  # file names need not be UTF-8
        sys.stdout.reconfigure(errors="replace")
        is_pipe, failed = not sys.stdin.isatty(), False
        if not is_pipe:
            _edit_lines([*self.commands, "/quit"])
            print(GREETING)
        messages = _messages()
        while True:
            try:
                message = next(messages, "/quit")
                if message.strip() == "/quit":
                    return int(failed and is_pipe)
                self.take(message)
            except KeyboardInterrupt:
                if is_pipe:
                    return 130
                print("\n(/quit or Ctrl-D leaves)")
                messages = _messages()
            except BrokenPipeError:  # the reader of our output is gone
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 1
            except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: out of memory
                failed = True
                print(f"error: {error}", file=sys.stderr, flush=True)
                messages = _messages()  # one that raises, as for an unclosed block, is at its end

    def take(self, message: str) -> None:
        """Run a command, or answer a message. Raises ValueError, OSError, RuntimeError."""
        line, others = message.partition("\n")[::2]
        name, rest = line.partition(" ")[::2]
        if name in self.commands:
            self.commands[name](rest.strip())
            if others:  # pasted with the command
                self.take(others)
        elif name.startswith("/") and not others:
            raise ValueError(f"unknown command '{name}'; /help lists them")
        else:
            self.ask(message)

    def ask(self, text: str) -> None:
        """Print the answer to `text` as it comes; it is about the images shown since the last question."""
        if not text and not self.shown.images:
            return
        turn = Turn(text, self.shown.images, self.shown.embeds)
        with _ctrl_c_event() as stop:
            print_notice = partial(print, "note:", file=sys.stderr, flush=True)
            hooks = {"stop_event": stop, "on_notice": print_notice}
            pieces = self.session.stream(self.chat, self.template, turn, **hooks, **self.settings)
            for piece in pieces:
                print(piece, end="", flush=True)
        print(" [stopped]" if stop.is_set() else "", flush=True)
        self.shown = Turn("", (), [])
        if stop.is_set() and not sys.stdin.isatty():
            raise KeyboardInterrupt

    def show(self, path: str) -> None:
        """Encode an image for the next question."""
        if not path:
            raise ValueError("/image: give the path of an image, for example /image photo.jpg")
        path = str(_path(path))
        new = Turn("", (path,))
        new.encode(self.chat)
        self.shown.images += new.images
        self.shown.embeds += new.embeds
        print(f"{printable(Path(path).name)}: received")

    def set(self, text: str) -> None:
        """Change a setting of the next answers."""
        name, value = text.partition(" ")[::2]
        if name not in Sampling.__dataclass_fields__:
            raise ValueError(
                f"/set: no setting '{name}'; there are {', '.join(Sampling.__dataclass_fields__)}"
            )
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(
                f"/set: '{value}' is no number; write for example /set temperature 0.7"
            ) from None
        Sampling(**{**self.settings, name: value})  # refuses what is out of range
        self.settings[name] = value

    def reset(self, _: str = "") -> None:
        """Forget the dialogue; the settings stay."""
        self.session.clear()
        self.shown = Turn("", (), [])
        print("new dialogue")

    def save(self, path: str) -> None:
        """Write settings, questions, image paths and answers to a JSON file."""
        if not path:
            raise ValueError("/save: give a file name, for example /save dialogue.json")
        turns = [
            {"question": t.text, "pictures": list(t.images), "answer": t.answer}
            for t in self.session.turns
        ]
        content = {"settings": self.settings, "turns": turns}
        written = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        # file names that are not UTF-8 are escaped
        _path(path).write_text(written, encoding="utf-8", errors="backslashreplace")
        print(f"{len(turns)} question(s) saved to {path}")


def _messages() -> Iterator[str]:
    """Yield the messages of the input: lines, stripped, or blocks between triple quotes. Raises ValueError."""
    is_at_keyboard, block = sys.stdin.isatty(), None
    while True:
        try:
            prompt = "> " if block is None else ". "
            line = input(prompt if is_at_keyboard else "")
        except EOFError:
            if block is not None:
                raise ValueError(f"the message that {BLOCK} began was never ended") from None
            return
        if block is None and line.lstrip().startswith(BLOCK):
            block, line = [], line.lstrip().removeprefix(BLOCK)
        if block is None:
            yield line.strip()
            continue
        block.append(line.rstrip().removesuffix(BLOCK))
        if line.rstrip().endswith(BLOCK):
            yield "\n".join(block).strip()
            block = None


def _edit_lines(commands: list[str]) -> None:
    """Let `input` edit and recall lines, take pasted text as one, and complete commands and paths by Tab."""
    try:
        import readline  # `input` uses it once it is imported
    except ImportError:  # not on every system
        return

    def complete(line: str, number: int) -> str | None:
        """Return completion `number` of the line, None after the last."""
        command, path = line.partition(" ")[::2]
        found = []
        if line.startswith("/") and " " not in line:
            found = [f"{name} " for name in commands if name.startswith(line)]
        elif " " in line:
            names = sorted(glob.glob(glob.escape(os.path.expanduser(path)) + "*"))
            found = [f"{command} {name}{'/' if os.path.isdir(name) else ''}" for name in names]
        return found[number] if number < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims("")  # file names may contain spaces
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    readline.parse_and_bind("set enable-bracketed-paste on")


def _path(text: str) -> Path:
    """Return the path that was typed, or dragged into the terminal, which quotes it or escapes its spaces."""
    path = expand_path(text.strip("'\""))
    if not path.exists():
        with suppress(ValueError):  # an unclosed quote is part of the name
            words = shlex.split(text)
            return expand_path(words[0]) if len(words) == 1 else path
    return path


@contextmanager
def _ctrl_c_event() -> Iterator[threading.Event]:
    """Yield a threading.Event that Ctrl-C sets, instead of raising KeyboardInterrupt in the computation."""
    event = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
