"""The folder of a run and the checkpoints in it.

<output_dir>/<job id>/checkpoint_<epoch>.pth               the end of an epoch (Source: 2023 release); kept
                      checkpoint_<epoch>_iter_<n>.pth      after n steps of that epoch; the last `run.keep_last_k`
                      checkpoint_best.pth                  of the best validation; kept, but `auto` never resumes from it
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
_START_FORMAT = "%Y%m%d%H%M"  # of a run's default name; a taken name gets a number appended
_NAME = re.compile(r"checkpoint_(\d+)(?:_iter_(\d+))?\.pth")


def new_folder(root: str | Path, name: str) -> Path:
    """Make and return a folder `name` below `root`, or `name`-2, .. if taken, with `result/` in it. Raises OSError."""
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
    """Return the default name of a run that starts now."""
    return time.strftime(_START_FORMAT)


class Hold(ExitStack):
    """Locks on the folders that only this run may write, until the `with` block or the process ends.

    The run's own folder is also kept open, so that it is found again if it is renamed. Only rank 0 locks and opens.
    """

    _descriptor = None  # of the run's folder

    def lock(self, folder: Path) -> None:
        """Lock a folder, made if necessary. Raises InUseError, or OSError that names run.output_dir, on all ranks."""

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
        """Lock the run's folder, remove the partial files of a killed run, and keep it open. Raises as `lock` does."""
        self.lock(folder)
        if is_main_process():
            for path in folder.iterdir():
                if path.name.endswith(PARTIAL):
                    remove(path)
            self._descriptor = os.open(folder, os.O_RDONLY)
            self.callback(os.close, self._descriptor)

    def followed(self, folder: Path) -> Path:
        """Return the current path of the run's folder: renamed, or made again if deleted. Logs a warning of either."""
        if self._descriptor is None or folder.is_dir():
            return folder
        try:
            # Linux keeps this link to an open folder up to date
            now = Path(os.readlink(f"/proc/self/fd/{self._descriptor}"))
            if os.path.samestat(os.stat(now), os.fstat(self._descriptor)):
                logging.warning("'%s' is now '%s': the run goes on there", folder, now)
                return now
        except OSError:
            pass  # it was deleted, or this is not Linux
        with suppress(OSError):  # the next write reports the error
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
    """Return the numbered checkpoints of a run, the latest in training first."""
    positions = {}
    for path in Path(folder).glob("checkpoint_*.pth"):
        if match := _NAME.fullmatch(path.name):
            # (epoch, step), where the end of an epoch comes after all of its steps
            positions[path] = int(match[1]), int(match[2] or 2**62)
    return sorted(positions, key=positions.get, reverse=True)


def newest_checkpoint(root: str | Path) -> Path | None:
    """Return the checkpoint from which the latest run below `root` resumes, None if there is none.

    A file that cannot be read is skipped with a warning. Raises CheckpointError if none can be read.
    """
    runs = [checkpoints(folder) for folder in Path(root).glob("*/")]
    runs = sorted(filter(None, runs), key=_start, reverse=True)
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


def _start(run: list[Path]) -> tuple[str, int]:
    """Return a sort key for when a run, given by its checkpoints, began.

    Its name says so if it has the default form, whatever copies or wrong clocks do to the files' times; else these do.
    """
    if match := re.fullmatch(r"(\d{12})(?:-(\d+))?", run[0].parent.name):
        return match[1], int(match[2] or 1)
    newest = max(path.stat().st_mtime for path in run)
    return time.strftime(_START_FORMAT, time.localtime(min(newest, time.time()))), 0


def prune(folder: str | Path, keep: int) -> None:
    """Remove all but the latest `keep` checkpoints that were written within an epoch."""
    mid_epoch = [path for path in checkpoints(folder) if _NAME.fullmatch(path.name)[2]]
    for path in mid_epoch[keep:]:
        remove(path)
