"""Checkpoints of a run: written whole or not at all, read without running any code that is in them.

A checkpoint is a dict of five keys (Source: 2023 release): `model`, the trainable tensors by name; `optimizer`,
AdamW's state dict; `config`, the unresolved configuration; `scaler`, the GradScaler's state dict or None; `epoch`,
the last finished one, counted from 0 (-1 within the first). A sixth, `progress`, is what an exact resume needs:
runners/run_state.py.
"""

import itertools
import logging
import math
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minigpt4.common.utils import not_weights, resolve_file

KEYS = ("model", "optimizer", "config", "scaler", "epoch")
PARTIAL = ".partial"  # ends the name of a file that is being written


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says what was found and what to do."""


@contextmanager
def understood(key: str, where: str, path: Path | str) -> Iterator[None]:
    """Within the block, what a checkpoint holds below `key` is taken over; if that fails, CheckpointError says so."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # of any kind: it may hold whatever another program has written
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise CheckpointError(
            f"{where}: what '{path}' holds below '{key}' cannot be used ({reason}); it was written by another program, "
            "or changed. Use another checkpoint, or start a new run from its weights with model.ckpt"
        ) from error


def save_checkpoint(path: Path, state: dict[str, Any]) -> bool:
    """Return whether `state` was written to `path`; if not, a warning says why, an older file stays.

    It is written beside `path`, forced to disk, and only then given its name: `path` is always whole.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return True
    except (OSError, RuntimeError) as error:  # torch raises the latter on top of the former
        reason = str(
            error.__context__ if isinstance(error.__context__, OSError) else error
        ).splitlines()[0]
        logging.warning("checkpoint not saved to %s (%s); training goes on", path, reason)
        return False
    finally:
        remove(partial)


def check_weights(path: str | Path, where: str) -> None:
    """Raise CheckpointError that names the key `where` if the first bytes of a file say that it is no weights."""
    if found := not_weights(path):
        raise CheckpointError(f"{where}: '{path}' {found}")


def load_pickle(path: str | Path, where: str, hint: str, mmap: bool = False) -> Any:
    """Return what a .pth file holds, tensors on the CPU; with `mmap` they are mapped, not yet read.

    Raises CheckpointError, ending in `hint`, if it is damaged, no weights at all, or would run code.
    """
    check_weights(path, where)
    mmap = mmap and zipfile.is_zipfile(path)  # what torch writes since 1.6; others cannot be mapped
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        culprit = f" ({culprit[1]})" if culprit else ""
        found = f"holds more than tensors and plain values{culprit}, and was not opened, for such a file can run code"
    except MemoryError:
        raise
    except Exception as error:  # of many kinds, for what is damaged can look like anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        found = f"is damaged or no file of torch ({reason})"
    raise CheckpointError(f"{where}: '{path}' {found}. {hint}")


def check_sums(path: str | Path, where: str, hint: str) -> None:
    """Raise CheckpointError, ending in `hint`, if a part of a .pth file does not have its checksum.

    torch does not look at them; files from before torch 1.6 have none.
    """
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except (
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            NotImplementedError,
            RuntimeError,
        ) as error:
            damaged = f"{type(error).__name__}, some part"
        if damaged is not None:
            raise CheckpointError(
                f"{where}: '{path}' is damaged ({damaged} has another checksum). {hint}"
            )


def load_checkpoint(
    path_or_url: str | Path, where: str, whole: bool = False
) -> tuple[dict[str, Any], Path]:
    """Return (state, path) of the training checkpoint that the key `where` names, on the CPU.

    `state` has the five keys; with `whole` all that the file holds. Raises FileNotFoundError if there is
    none, CheckpointError if it is not one, is damaged, or would run code.
    """
    path = resolve_file(path_or_url, where)
    hint = f"Use another checkpoint; it has the keys {', '.join(KEYS)}"
    state = load_pickle(path, where, hint)
    check_sums(path, where, hint)
    keys = sorted(map(str, state)) if isinstance(state, dict) else [type(state).__name__]
    if missing := [key for key in KEYS if not isinstance(state, dict) or key not in state]:
        found = ", ".join(keys[:8])
        raise CheckpointError(
            f"{where}: '{path}' has no {', '.join(missing)} (found: {found or 'nothing'}); a training run is resumed "
            f"from a checkpoint with {', '.join(KEYS)}. To start a new run from its weights, set model.ckpt instead"
        )
    return state if whole else {key: state[key] for key in KEYS}, path


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], where: str) -> None:
    """Restore AdamW's moments; learning rate, decay, betas stay those of the configuration.

    Raises CheckpointError if `saved` is of other parameters, any error if it is no state of AdamW.
    """
    # By count and shape: AdamW's state has no names.
    own, groups = optimizer.state_dict()["param_groups"], saved.get("param_groups", [])
    own_sizes = [len(group["params"]) for group in own]
    sizes = [len(group["params"]) for group in groups]
    parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    own_shapes = dict(enumerate(tuple(parameter.shape) for parameter in parameters))
    shapes = {
        index: tuple(state["exp_avg"].shape) for index, state in saved.get("state", {}).items()
    }
    if sizes != own_sizes or not shapes.items() <= own_shapes.items():
        raise CheckpointError(
            f"{where}: the optimizer state is of other parameters: groups of {sizes!s:.200} with shapes "
            f"{list(shapes.values())!s:.200}, this run trains groups of {own_sizes} with shapes "
            f"{list(own_shapes.values())}. Freeze the same parts as the run that wrote it, or start a new run from its "
            "weights with model.ckpt"
        )
    # A flipped bit in the moments would be a wrong step, not an error.
    for state in saved["state"].values():
        first, second = state["exp_avg"], state["exp_avg_sq"]
        is_usable = (first.isfinite() & (second >= 0)).all() and math.isfinite(float(state["step"]))
        if first.shape != second.shape or not is_usable:
            raise ValueError("moments that do not belong together, or are not finite")
    # Only the moments come from the checkpoint; the schedule and the decay are the configuration's.
    for old, new in zip(groups, own, strict=True):
        if old.get("weight_decay") != new["weight_decay"]:
            change = new["weight_decay"], old["weight_decay"]
            logging.warning("run.weight_decay: %s from here on, the checkpoint had %s", *change)
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})


def remove(path: Path) -> None:
    """Delete a file that may be there; what cannot be deleted is a warning."""
    try:
        if path.exists():
            path.unlink(missing_ok=True)
    except OSError as error:
        logging.warning("cannot remove %s (%s)", path, error)
