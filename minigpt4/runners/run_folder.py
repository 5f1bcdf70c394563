"""The folder of a run and the checkpoints in it.

<output_dir>/<job id>/checkpoint_<epoch>.pth               the end of an epoch (Source: 2023 release); kept
                      checkpoint_<epoch>_iter_<n>.pth      after n steps of that epoch; the last `run.keep_last_k`
                      checkpoint_best.pth                  of the best validation; kept, and no place that `auto` finds
                      log.txt, metrics.jsonl, result/
                      samples.html, samples.jsonl          answers to held-out samples, by validation
                      .lock                                while a run writes there: common/lock.py
"""

import itertools
import logging
import os
import re
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from minigpt4.common.checkpoint import PARTIAL, CheckpointError, load_checkpoint, remove
from minigpt4.common.dist_utils import from_main, is_main_process
from minigpt4.common.lock import InUseError, locked

AUTO = "auto"  # run.resume_ckpt_path: the newest readable checkpoint below run.output_dir, if any
BEST = "checkpoint_best.pth"
_STARTED = "%Y%m%d%H%M"  # the name of a run, with a number behind it where that is taken
_NAME = re.compile(r"checkpoint_(\d+)(?:_iter_(\d+))?\.pth")


def new_folder(root: str | Path, name: str) -> Path:
    """Return a new folder below `root`, with `result/` in it. Raises OSError."""
    for number in range(1, 10_000):
        folder = Path(root) / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            (folder / "result").mkdir()
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            message = f"cannot make a folder in '{root}' ({error}); choose another place"
            raise OSError(f"run.output_dir: {message}") from error
    raise OSError(f"run.output_dir: '{root}' is full of runs named {name}")


def time_name() -> str:
    """Return the name of a run that starts now."""
    return time.strftime(_STARTED)


class Hold(ExitStack):
    """The folders that this run writes, and no other run: locked until the end of a `with` block, or of the process.

    The run's own is kept open, too, so that it is found again if it is renamed. Rank 0 does all that.
    """

    _descriptor = None  # of the run's folder

    def lock(self, folder: Path) -> None:
        """Lock a folder, made if need be. Raises InUseError, or OSError that names run.output_dir, on all ranks."""

        def make() -> None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self.enter_context(locked(folder))
            except InUseError:
                raise
            except OSError as error:
                message = f"cannot make a folder in '{folder}' ({error}); choose another place"
                raise OSError(f"run.output_dir: {message}") from error

        from_main(make)

    def open(self, folder: Path) -> None:
        """Lock the run's folder, remove what a killed run left half-written, and keep it open. Raises as `lock`."""
        self.lock(folder)
        if is_main_process():
            for path in folder.iterdir():
                if path.name.endswith(PARTIAL):
                    remove(path)
            self._descriptor = os.open(folder, os.O_RDONLY)
            self.callback(os.close, self._descriptor)

    def followed(self, folder: Path) -> Path:
        """Return where the run's folder is now; one that was deleted is made again. Says so."""
        if self._descriptor is None or folder.is_dir():
            return folder
        try:
            # Linux keeps it up to date
            now = Path(os.readlink(f"/proc/self/fd/{self._descriptor}"))
            if os.path.samestat(os.stat(now), os.fstat(self._descriptor)):
                logging.warning("'%s' is now '%s': the run goes on there", folder, now)
                return now
        except OSError:
            pass  # it was deleted, or this is no Linux
        with suppress(OSError):  # what is written next says why it cannot be
            (folder / "result").mkdir(parents=True)
            logging.warning(
                "'%s' is gone, with what was in it; it is made again, and the run goes on there",
                folder,
            )
        return folder


def checkpoint_name(epoch: int, step: int | None = None) -> str:
    """Return the file name of the checkpoint at the end of `epoch`, or after `step` steps of it."""
    return f"checkpoint_{epoch}.pth" if step is None else f"checkpoint_{epoch}_iter_{step}.pth"


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints of a run, the furthest first."""
    reached = {}
    for path in Path(folder).glob("checkpoint_*.pth"):
        if match := _NAME.fullmatch(path.name):
            reached[path] = int(match[1]), int(match[2] or 2**62)  # an epoch's end comes last
    return sorted(reached, key=reached.get, reverse=True)


def newest_checkpoint(root: str | Path) -> Path | None:
    """Return the checkpoint from which the latest run below `root` resumes, None if there is none.

    One that cannot be read is passed over, with a warning. Raises CheckpointError if none can.
    """
    runs = [found for folder in Path(root).glob("*/") if (found := checkpoints(folder))]
    runs.sort(key=_start, reverse=True)
    tried = list(itertools.chain.from_iterable(runs))
    for path in tried:
        try:
            load_checkpoint(path, "run.resume_ckpt_path")
        except CheckpointError as error:
            logging.warning("%s; trying the one before", error)
        else:
            return path
    if tried:
        raise CheckpointError(
            f"run.resume_ckpt_path: none of the {len(tried)} checkpoints below '{root}' can be read, "
            "see above; to start from the beginning, choose another run.output_dir"
        )
    return None


def _start(found: list[Path]) -> tuple[str, int]:
    """Return when a run began, to be compared: its name says it, which copies and wrong clocks leave alone.

    A name of another form has only the times of the files.
    """
    if match := re.fullmatch(r"(\d{12})(?:-(\d+))?", found[0].parent.name):
        return match[1], int(match[2] or 1)
    newest = max(path.stat().st_mtime for path in found)
    return time.strftime(_STARTED, time.localtime(min(newest, time.time()))), 0


def prune(folder: str | Path, keep: int) -> None:
    """Remove all but the furthest `keep` checkpoints that were written within an epoch."""
    within_epochs = [path for path in checkpoints(folder) if _NAME.fullmatch(path.name)[2]]
    for path in within_epochs[keep:]:
        remove(path)
