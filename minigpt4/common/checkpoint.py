"""Checkpoints of a run: written atomically, and read without running code from them.

A checkpoint is a dict of five keys (Source: 2023 release): `model`, the trainable tensors by name; `optimizer`,
AdamW's state dict; `config`, the unresolved configuration; `scaler`, the GradScaler's state dict or None; `epoch`,
the last finished epoch, counted from 0 (-1 within the first). A sixth, `progress`, holds what else an exact resume
needs: runners/run_state.py.
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

from minigpt4.common.utils import first_line, not_weights, resolve_file

KEYS = ("model", "optimizer", "config", "scaler", "epoch")
PARTIAL = ".partial"  # suffix of a file that is being written


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says what was found and what to do."""


@contextmanager
def understood(key: str, where: str, path: Path | str) -> Iterator[None]:
    """Within the block, which uses what a checkpoint holds under `key`, turn any error into a CheckpointError."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # of any kind: another program may have written anything there
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise CheckpointError(
            f"{where}: what '{path}' holds below '{key}' cannot be used ({reason}); it was written by another program, "
            "or changed. Use another checkpoint, or start a new run from its weights with model.ckpt"
        ) from error


def save_checkpoint(path: Path, state: dict[str, Any]) -> bool:
    """Write `state` to `path`; return whether it worked. If not, a warning says why, and an older file stays.

    It is written beside `path`, synced to disk, and only then renamed: the file at `path` is always complete.
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
    except (OSError, RuntimeError) as error:
        # while torch handles an OSError, it may raise a RuntimeError that says less
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = first_line(cause)
        logging.warning("checkpoint not saved to %s (%s); training goes on", path, reason)
        return False
    finally:
        remove(partial)


def check_weights(path: str | Path, where: str) -> None:
    """Raise CheckpointError, which names the key `where`, if a file cannot be weights by its first bytes."""
    if found := not_weights(path):
        raise CheckpointError(f"{where}: '{path}' {found}")


def load_pickle(path: str | Path, where: str, hint: str, mmap: bool = False) -> Any:
    """Return the content of a .pth file, tensors on the CPU; with `mmap` they are memory-mapped, not read yet.

    Raises CheckpointError, ending in `hint`, if it is damaged, not weights at all, or would run code.
    """
    check_weights(path, where)
    mmap = mmap and zipfile.is_zipfile(path)  # older formats, before torch 1.6, cannot be mapped
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        culprit = f" ({culprit[1]})" if culprit else ""
        found = f"holds more than tensors and plain values{culprit}, and was not opened, for such a file can run code"
    except MemoryError:
        raise
    except Exception as error:  # of any kind: a damaged file can look like anything
        reason = first_line(error).rstrip(".")
        found = f"is damaged or no file of torch ({reason})"
    raise CheckpointError(f"{where}: '{path}' {found}. {hint}")


def check_sums(path: str | Path, where: str, hint: str) -> None:
    """Raise CheckpointError, ending in `hint`, if a part of a .pth file does not match its checksum.

    torch does not check them; files from before torch 1.6 have none.
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
    """Return (state, local path) of a training checkpoint, tensors on the CPU; messages name the key `where`.

    `state` has the five keys; with `whole` everything in the file. Raises FileNotFoundError if there is no
    file, CheckpointError if it is not a checkpoint, is damaged, or would run code.
    """
    path = resolve_file(path_or_url, where)
    hint = f"Use another checkpoint; it has the keys {', '.join(KEYS)}"
    state = load_pickle(path, where, hint)
    check_sums(path, where, hint)
    is_dict = isinstance(state, dict)
    if missing := [key for key in KEYS if not is_dict or key not in state]:
        found = ", ".join(sorted(map(str, state))[:8]) if is_dict else type(state).__name__
        raise CheckpointError(
            f"{where}: '{path}' has no {', '.join(missing)} (found: {found or 'nothing'}); a training run is resumed "
            f"from a checkpoint with {', '.join(KEYS)}. To start a new run from its weights, set model.ckpt instead"
        )
    return state if whole else {key: state[key] for key in KEYS}, path


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any], where: str) -> None:
    """Restore AdamW's moments; learning rate, weight decay and betas stay those of the configuration.

    Raises CheckpointError if `saved` is of other parameters, an error of any kind if it is not a state of AdamW.
    """
    # Compare the parameters by count and shape: AdamW's state has no names.
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
    # Damaged moments would not raise an error, but make a wrong step.
    for state in saved["state"].values():
        first, second = state["exp_avg"], state["exp_avg_sq"]
        is_usable = (first.isfinite() & (second >= 0)).all() and math.isfinite(float(state["step"]))
        if first.shape != second.shape or not is_usable:
            raise ValueError("moments that do not belong together, or are not finite")
    # Everything but the moments comes from the configuration.
    for old, new in zip(groups, own, strict=True):
        if old.get("weight_decay") != new["weight_decay"]:
            change = new["weight_decay"], old["weight_decay"]
            logging.warning("run.weight_decay: %s from here on, the checkpoint had %s", *change)
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})


def remove(path: Path) -> None:
    """Delete a file if it exists; a failure is only a warning."""
    try:
        if path.exists():
            path.unlink(missing_ok=True)
    except OSError as error:
        logging.warning("cannot remove %s (%s)", path, error)
