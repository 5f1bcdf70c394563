"""What the programs share: a user's mistake ends in a message, a bug in a traceback."""

import gc
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from minigpt4.common.config_report import ConfigError


class Interrupted(KeyboardInterrupt):
    """A signal ended the program in good order; the message says what was saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


_OWN_CODE = Path(__file__).resolve().parents[1]


def run_program(program: Callable[..., int | None], *args: Any) -> int:
    """Return the exit code of `program(*args)`: 0; 2: configuration refused; 1: another mistake.

    A signal gives 128 and its number (130 for Ctrl-C, 143 for SIGTERM, 129 for a terminal that was closed).

    Errors that this package or the program's own file raises are messages for the user, printed as
    such. An error that comes out of a library is unexpected, and keeps its traceback.
    """
    # Imports make objects by the million, which stay: to look for garbage after every 700 new ones, as Python does, took
    # a fifth of their time.
    gc.set_threshold(20_000, 20, 20)
    with suppress(AttributeError):  # a stream of somebody else's
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be printable
    try:
        return program(*args) or 0
    except ConfigError as error:
        _say(error)
        return 2
    except (ValueError, KeyError, OSError, MemoryError) as error:
        if not _raised_by_us(error, program):
            raise
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt as error:
        _say(str(error) or "interrupted")
        return getattr(error, "exit_code", 130)


def _say(message: object) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(message, file=sys.stderr, flush=True)


def _raised_by_us(error: Exception, program: Callable) -> bool:
    origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return (
        origin.is_relative_to(_OWN_CODE) or origin == Path(program.__code__.co_filename).resolve()
    )
