"""SIGTERM and SIGINT while training: all ranks agree, save after the same step, and leave."""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from minigpt4.common.cli import Interrupted
from minigpt4.common.dist_utils import get_world_size


class Interruption:
    """Notes a signal; `agreed` tells every rank after the same step that one of them got one.

    A second one works as if this were not here. DataLoader workers outlive it: see dataloader_utils.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._time, self._pending = 0.0, None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block signals are noted instead of ending the process."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal, self._time = signal.Signals(number), time.monotonic()
        signal.signal(number, signal.SIG_DFL)
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

    def ended(self, path: Path | None, epoch: int, step: int) -> Interrupted:
        """Return the exception that ends the program, after `path` was saved."""
        name = self.signal.name if self.signal else "a signal to another rank"
        where = f"saved {path}" if path else "nothing could be saved, see above"
        if self.signal:
            where += f", {time.monotonic() - self._time:.2f} s after the signal"
        message = f"ended by {name} before epoch {epoch}, step {step}: {where}; resume with --resume auto"
        return Interrupted(message, 128 + (self.signal or signal.SIGTERM))
