"""Signals that end a training: all ranks agree on it, save after the same step, and exit."""

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
from minigpt4.common.dist_utils import gather_from_ranks, get_world_size

# A terminal that closes sends SIGHUP, often twice; schedulers send SIGTERM, or the signal they are configured to send.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SECOND_KILLS = (signal.SIGTERM, signal.SIGINT)  # a second one ends the process at once


class Interruption:
    """Notes the first of SIGNALS; `agreed` tells all ranks after the same step that one of them got a signal.

    A second SIGTERM or SIGINT has its default effect. DataLoader workers survive signals: see dataloader_utils.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._time, self._pending = 0.0, None
        self._uses_death_signal = False  # the kernel sends SIGTERM when the parent, torchrun, dies

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block, note signals instead of ending the process.

        Leaves signals alone that are ignored, as SIGHUP under nohup, or that other code handles.
        """
        self._process = os.getpid()
        is_by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self._uses_death_signal = is_by_torchrun and hasattr(
            torch.multiprocessing, "_prctl_pr_set_pdeathsig"
        )
        replaceable = {number: [signal.SIG_DFL, signal.default_int_handler] for number in SIGNALS}
        # torchrun handles SIGHUP even under nohup: it forwards it, and kills the ranks left after 30 s
        if is_by_torchrun:
            replaceable[signal.SIGHUP].append(signal.SIG_IGN)
        before = {}
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler in replaceable[number]:
                before[number] = handler
                signal.signal(number, self._note)
        if self._uses_death_signal:
            # a signal that torchrun is not told to forward kills it, and would leave its ranks running
            torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGTERM)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: note the first one. DataLoader workers inherit this handler, but note nothing."""
        # torchrun's threads die one by one, each with a death signal: take only the first
        if self._uses_death_signal and os.getpid() == self._process:
            torch.multiprocessing._prctl_pr_set_pdeathsig(0)
        if number in _SECOND_KILLS:
            signal.signal(number, signal.SIG_DFL)
        if self.signal is None and os.getpid() == self._process:
            self.signal, self._time = signal.Signals(number), time.monotonic()
            logging.warning("%s: saving after this step, then ending", self.signal.name)

    def agreed(self, ranks_interrupted: torch.Tensor) -> bool:
        """Return whether to end. `ranks_interrupted`: how many ranks have got a signal, equal on all ranks.

        Several ranks on GPUs look at the number of the step before: to wait for this step's would slow down every step.
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

    def agreed_by_all(self) -> bool:
        """Return whether a rank has got a signal, alike on all ranks, which wait for each other."""
        return any(gather_from_ranks(self.signal is not None))

    def ended(self, is_saved: bool, path: Path | None, epoch: int, step: int) -> Interrupted:
        """Return the exception that ends the program before a step.

        `is_saved`: whether the run was saved at that step; `path`: the last checkpoint. Both come from rank 0.
        """
        name = self.signal.name if self.signal else "a signal to another rank"
        since = f", {time.monotonic() - self._time:.2f} s after the signal" if self.signal else ""
        if is_saved:
            outcome = f"saved {path}{since}; resume with --resume auto"
        else:
            last = "there is none"
            if path:
                last = f"the last checkpoint is {path}; resume from it with --resume auto"
            outcome = "what was trained since the last checkpoint could not be saved, see above: "
            outcome += last
        message = f"ended by {name} before epoch {epoch}, step {step}: {outcome}"
        return Interrupted(message, 128 + (self.signal or signal.SIGTERM))
