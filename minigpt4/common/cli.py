"""Running a program: a user's mistake ends in a message, a bug in a traceback."""

import gc
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from minigpt4.common.config_report import ConfigError


class Interrupted(KeyboardInterrupt):
    """A signal ended the program in an orderly way; the message says what was saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


_PACKAGE = Path(__file__).resolve().parents[1]


def run_program(program: Callable[..., int | None], *args: Any) -> int:
    """Run `program(*args)` and return the exit code: 0; 2 for a refused configuration; 1 for another mistake of the user.

    A signal gives 128 plus its number (130 for Ctrl-C, 143 for SIGTERM, 129 for a terminal that was closed).

    Errors that this package or the program's own file raises are messages for the user, and are printed
    without traceback. An error raised by a library is unexpected, and keeps its traceback.
    """
    # Imports create millions of objects that stay: to collect garbage after every 700 new ones, Python's default, took a
    # fifth of their time.
    gc.set_threshold(20_000, 20, 20)
    with suppress(AttributeError):  # stdout may be another kind of stream
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be unprintable
    try:
        return program(*args) or 0
    except ConfigError as error:
        _print_error(error)
        return 2
    except (ValueError, KeyError, OSError, MemoryError) as error:
        if not _is_own_error(error, program):
            raise
        _print_error(f"error: {error}")
        return 1
    except KeyboardInterrupt as error:
        _print_error(str(error) or "interrupted")
        return getattr(error, "exit_code", 130)


def _print_error(message: object) -> None:
    with suppress(OSError):  # the terminal may be gone
        print(message, file=sys.stderr, flush=True)


def _is_own_error(error: Exception, program: Callable) -> bool:
    """Return whether an error was raised in this package or in the program's file, not in a library."""
    origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return origin.is_relative_to(_PACKAGE) or origin == Path(program.__code__.co_filename).resolve()
