"""What is wrong with a configuration: one Problem a key, and where the user set that key."""

import dataclasses
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatch


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong with one key of a configuration, such as `datasets.laion.build_info.storage`.

    `place`, filled in by Report, is where the user set the key: "--options" or "config.yaml line 3".
    """

    key: str
    message: str
    place: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" + (f" ({self.place})" if self.place else "")

    @classmethod
    def parse(cls, text: object, section: str) -> "Problem":
        """Return the Problem of a text `key: message`; its key is `section` if the text names none within it."""
        key, *message = str(text).split(": ", 1)
        return cls(key, *message) if message and is_in(key, section) else cls(section, str(text))


def is_in(key: str, section: str) -> bool:
    """Return whether a full key is `section` or below it: run.seed is in run, running.seed is not."""
    return f"{key}.".startswith(f"{section}.")


class ConfigError(ValueError):
    """Everything that is wrong with a configuration: `problems`, a list of Problem."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        super().__init__("\n  ".join([f"{count} in the configuration:", *map(str, self.problems)]))

    def __reduce__(self) -> tuple:
        # for pickle, between ranks, which would pass the message
        return type(self), (self.problems,)


class Report:
    """Collects `problems` (Problem) and `warnings` (text).

    Problems with what a value names (e.g. a missing file) go to `unopened` {key: first Problem} instead
    if the key matches one of the patterns `unopened`.
    """

    def __init__(self, unopened: Sequence[str] = ()) -> None:
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.unopened: dict[str, Problem] = {}
        self.places: dict[str, str] = {}  # full key -> where the user set it
        self._patterns = unopened

    def add(self, key: str, message: str, is_content: bool = False) -> None:
        """Add a problem; `is_content`: it is with what the value names (e.g. a file), not with the value itself."""
        problem = Problem(key, message, self.places.get(key, ""))
        if is_content and any(fnmatch(key, pattern) for pattern in self._patterns):
            self.unopened.setdefault(key, problem)
        else:
            self.problems.append(problem)

    def add_found(self, problems: Iterable[Problem | str], section: str) -> None:
        """Add the problems that a class found in its section: Problems, or texts `key: message`."""
        for found in problems:
            problem = found if isinstance(found, Problem) else Problem.parse(found, section)
            self.add(problem.key, problem.message, is_content=True)

    def unknown(
        self, key: str, what: str, known: Iterable[object], guess: str | None = None
    ) -> None:
        """Add the problem that `what` is not one of `known`; suggest the one closest to `guess` (default: the key's name)."""
        names = sorted(map(str, known))
        close = get_close_matches(guess or key.rsplit(".", 1)[-1], names, n=1)
        hint = f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(names)}"
        self.add(key, f"unknown {what}. {hint}")

    def is_clean(self, section: str) -> bool:
        """Return whether `section` has no problem so far."""
        return not any(is_in(problem.key, section) for problem in self.problems)
