"""A batch that does not come ends the run with the name of who should bring it; so does a signal that is then given."""

import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from minigpt4.common.dist_utils import get_rank
from minigpt4.common.waiting import current_wait
from minigpt4.runners.interruption import Interruption

GRACE_S = 15  # for the batch of the step after which a signal saves; schedulers kill after 30 s


@contextmanager
def data_watched(timeout_s: float, interruption: Interruption) -> Iterator[None]:
    """Within the block the program ends if a batch takes more than `timeout_s` seconds without any progress.

    After a signal it waits for no more than GRACE_S.
    """
    is_over = threading.Event()
    threading.Thread(target=_watch, args=(timeout_s, interruption, is_over), daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def _watch(timeout_s: float, interruption: Interruption, is_over: threading.Event) -> None:
    seen = signalled = None
    since = time.monotonic()
    while not is_over.wait(min(1, timeout_s / 4)):
        now, wait = time.monotonic(), current_wait()
        signal = interruption.signal
        signalled = signalled or (now if signal else None)
        state = wait and (wait, wait.progress())
        if state != seen:
            seen, since = state, now
        if wait and signal and now - max(signalled, since) > GRACE_S:
            _end(
                f"{signal.name} came, and nothing could be saved",
                wait.what(),
                now - wait.since,
                128 + signal,
            )
        if wait and now - since > timeout_s:
            _end("run.step_timeout_s", wait.what(), now - wait.since, 1)


def _end(why: str, what: str, waited: float, code: int) -> None:
    """End the program at once: the main thread waits, and workers that are stopped would be waited for."""
    logging.critical(
        f"rank {get_rank()} waits for {what} since {waited:.0f} s ({why}). Ending the run; resume with --resume auto"
    )
    sys.stderr.flush()
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)
