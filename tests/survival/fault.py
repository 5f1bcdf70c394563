"""A fault: what is damaged or done to a run, and what the run has to do about it."""

import os
import resource
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.survival.damage import Place, shards
from tests.survival.kill import losses
from tests.survival.processes import children

Act = Callable[[subprocess.Popen, Place], None]


@dataclass(frozen=True)
class Fault:
    """One row of the table in docs/reliability.md.

    `says` and `also`: patterns that the output must match, `says` is shown; `never`: one that it must not match.
    `lost`: samples skipped by reason, None where the run ends before it counts. `make(place)` returns settings that go
    before `settings`; `act(process, place)` does something to the running program. `launcher`: options of torchrun.
    """

    group: str
    name: str
    says: str = r"\w+: \d+ of \d+ samples skipped.*"
    code: int = 0
    lost: dict | None = None
    make: Callable[[Place], dict] = field(default_factory=shards)
    settings: dict = field(default_factory=dict)
    also: tuple = ()
    never: str = r"pass-word|to-ken"
    stage: int = 1
    ranks: int = 1
    act: Act | None = None
    unprivileged: bool = False
    launcher: tuple = ()
    program: str = "train.py"


def at_step(step: int, do: Callable[[subprocess.Popen], object]) -> Act:
    """Do `do(process)` once a step is made."""

    def act(process, place):
        while process.poll() is None and step not in losses(place.folder / "out"):
            time.sleep(0.05)
        if process.poll() is None:
            do(process)

    return act


def send(number: int) -> Callable[[subprocess.Popen], None]:
    """Send a signal to the program."""
    return lambda process: process.send_signal(number)


def send_to_child(number: int) -> Callable[[subprocess.Popen], None]:
    """Send a signal to the process that is furthest below the program."""
    return lambda process: os.kill(children(process.pid)[-1], number)


def limited(which: int, size: int, until: str | None = None) -> Act:
    """The program may not use more than `size` bytes of something, until its output has `until`."""

    def act(process, place):
        hard = resource.prlimit(process.pid, which)[1]
        resource.prlimit(process.pid, which, (size, hard))
        while until and process.poll() is None:
            if until in (place.folder / "said.txt").read_text():
                return resource.prlimit(process.pid, which, (hard, hard))
            time.sleep(0.05)

    return act
