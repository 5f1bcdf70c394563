"""Signals to end while training: all ranks agree, save after the same step, and leave."""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from minigpt4.common.cli import Interrupted
from minigpt4.common.dist_utils import get_world_size

# A terminal that closes sends SIGHUP, often twice; schedulers send SIGTERM, or what they are asked for.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_TWICE_AT_ONCE = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """Notes a signal of SIGNALS; `agreed` tells every rank after the same step that one of them got one.

    A second SIGTERM or SIGINT works as if this were not here. DataLoader workers outlive it: see dataloader_utils.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._time, self._pending = 0.0, None
        self._tells_death = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block signals are noted instead of ending the process.

        Not those that are ignored, as SIGHUP under nohup, or that someone else's code answers.
        """
        self._process = os.getpid()
        is_by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self._tells_death = is_by_torchrun and hasattr(
            torch.multiprocessing, "_prctl_pr_set_pdeathsig"
        )
        ours = {number: [signal.SIG_DFL, signal.default_int_handler] for number in SIGNALS}
        # it takes SIGHUP under nohup, too, hands it on, and kills who is still there 30 s later
        if is_by_torchrun:
            ours[signal.SIGHUP].append(signal.SIG_IGN)
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: how for number, how in before.items() if how in ours[number]}
        for number in before:
            signal.signal(number, self._note)
        if self._tells_death:
            # torchrun, of a signal that it was not told to hand on, dies, and would leave its ranks at work
            torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGTERM)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # told once: its threads die one after the other
        if self._tells_death and os.getpid() == self._process:
            torch.multiprocessing._prctl_pr_set_pdeathsig(0)
        if number in _TWICE_AT_ONCE:
            signal.signal(number, signal.SIG_DFL)
        # not a worker, which inherits this
        if self.signal is None and os.getpid() == self._process:
            self.signal, self._time = signal.Signals(number), time.monotonic()
            logging.warning("%s: saving after this step, then ending", self.signal.name)

    def agreed(self, ranks_interrupted: torch.Tensor) -> bool:
        """Return whether to end. `ranks_interrupted`: how many ranks had a signal, known to all.

        On a GPU the number of the step before is looked at: waiting for this one costs every step.
        """
        if ranks_interrupted.device.type != "cuda":
            return ranks_interrupted.item() > 0
        if get_world_size() == 1:
            return self.signal is not None
        previous, event = self._pending or (None, None)
        host = torch.empty((), pin_memory=True)
        host.copy_(ranks_interrupted, non_blocking=True)
        self._pending = host, torch.cuda.Event()
        self._pending[1].record()
        if previous is None:
            return False
        event.synchronize()
        return previous.item() > 0

    def ended(self, is_saved: bool, path: Path | None, epoch: int, step: int) -> Interrupted:
        """Return the exception that ends the program before a step.

        `is_saved`: whether that step was saved; `path`: the last checkpoint. Both as rank 0 knows them.
        """
        name = self.signal.name if self.signal else "a signal to another rank"
        since = f", {time.monotonic() - self._time:.2f} s after the signal" if self.signal else ""
        where = f"saved {path}{since}; resume with --resume auto"
        if not is_saved:
            last = (
                f"the last checkpoint is {path}; resume from it with --resume auto"
                if path
                else "there is none"
            )
            where = (
                f"what was trained since the last checkpoint could not be saved, see above: {last}"
            )
        message = f"ended by {name} before epoch {epoch}, step {step}: {where}"
        return Interrupted(message, 128 + (self.signal or signal.SIGTERM))
