"""The folder of a run and the checkpoints in it.

<output_dir>/<job id>/checkpoint_<epoch>.pth               the end of an epoch (Source: 2023 release); kept
                      checkpoint_<epoch>_iter_<n>.pth      after n steps of that epoch; the last `run.keep_last_k`
                      log.txt, metrics.jsonl, result/
"""

import itertools
import logging
import re
from pathlib import Path

from minigpt4.common.checkpoint import CheckpointError, load_checkpoint, remove

AUTO = "auto"  # run.resume_ckpt_path: the newest readable checkpoint below run.output_dir, if any
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
    runs.sort(key=lambda found: max(path.stat().st_mtime_ns for path in found), reverse=True)
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


def prune(folder: str | Path, keep: int) -> None:
    """Remove all but the furthest `keep` checkpoints that were written within an epoch."""
    within_epochs = [path for path in checkpoints(folder) if _NAME.fullmatch(path.name)[2]]
    for path in within_epochs[keep:]:
        remove(path)
