"""A watch that ends the run, saying what it waits for, if a batch does not come in time, or not soon after a signal."""

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

GRACE_S = 15  # after a signal, for the batch of the step before saving; schedulers kill after 30 s


@contextmanager
def data_watched(timeout_s: float, interruption: Interruption) -> Iterator[None]:
    """Within the block, end the program if a batch takes more than `timeout_s` seconds without any progress.

    After a signal, the limit is GRACE_S.
    """
    is_over = threading.Event()
    threading.Thread(target=_watch, args=(timeout_s, interruption, is_over), daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def _watch(timeout_s: float, interruption: Interruption, is_over: threading.Event) -> None:
    """Look at the main thread's current wait until `is_over`; end the program if it takes too long."""
    last_state = signal_time = None
    last_progress = time.monotonic()
    while not is_over.wait(min(1, timeout_s / 4)):
        now, wait = time.monotonic(), current_wait()
        signal = interruption.signal
        if signal and signal_time is None:
            signal_time = now
        state = wait and (wait, wait.progress())
        if state != last_state:
            last_state, last_progress = state, now
        if not wait:
            continue
        if signal and now - max(signal_time, last_progress) > GRACE_S:
            why = f"{signal.name} came, and nothing could be saved"
            _end(why, wait.what(), now - wait.since, 128 + signal)
        if now - last_progress > timeout_s:
            _end("run.step_timeout_s", wait.what(), now - wait.since, 1)


def _end(why: str, what: str, waited: float, code: int) -> None:
    """End the program at once: the main thread is blocked, and a normal exit would wait for stopped workers."""
    logging.critical(
        f"rank {get_rank()} has waited {waited:.0f} s for {what} ({why}). Ending the run; resume with --resume auto"
    )
    sys.stderr.flush()
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(code)
