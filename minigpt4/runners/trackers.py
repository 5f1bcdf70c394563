"""Experiment trackers by `run.report_to`: W&B, TensorBoard, trackio and MLflow, through accelerate's tracker classes.

A tracker gets the configuration and the records of `metrics.jsonl`. It must never disturb the training: each one is
called in a thread of its own only, and an error or a hang there is only a warning.
"""

import importlib
import inspect
import json
import logging
import math
import os
import queue
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt4.common.config import Problem
from minigpt4.common.dist_utils import is_main_process
from minigpt4.common.utils import first_line
from minigpt4.common.versions import is_installed

START_S = 30  # the longest wait for a tracker to start
CLOSE_S = 30  # the longest wait at the end for the next record to be sent,
_MOST_WAITS = 4  # and how many such waits at most
_WANDB_START_S = 20  # if the server has not answered by then, W&B works offline
_MOST_WAITING = 10_000  # records in the queue of a tracker that is slower than the training
_IDS = "trackers.json"  # in the run's folder: {tracker: the id of its run}, for a resume


def tracker_names(run_cfg: Any) -> list[str]:
    """Return the trackers of a `run` section, from `run.report_to` and `run.tensorboard`, each once."""
    named = run_cfg.report_to or []
    if isinstance(named, str) or not isinstance(named, Sequence):
        named = [named]
    names = list(map(str, named))
    if run_cfg.tensorboard:
        names.append("tensorboard")
    return list(dict.fromkeys(names))


def find_tracker_problems(run_cfg: Any, where: str) -> list[Problem]:
    """Return what is wrong with the trackers of the section `where`."""
    problems = []
    for name in tracker_names(run_cfg):
        is_by_flag = name == "tensorboard" and run_cfg.tensorboard
        key = f"{where}.tensorboard" if is_by_flag else f"{where}.report_to"
        if name not in OPENERS:
            problems.append(
                Problem(key, f"{name!r} is no tracker; give some of {', '.join(OPENERS)}, or null")
            )
        elif not is_installed(name):
            problems.append(Problem(key, f"{name} needs the package {name}; pip install {name}"))
    return problems


def open_trackers(run: Any) -> "Trackers | None":
    """Return the trackers of a runner whose folder is open; None if it has none, and on ranks other than 0."""
    names = tracker_names(run.run_cfg)
    if not names or not is_main_process():
        return None
    return Trackers(names, run.output_dir, run.config.to_dict())


class Trackers:
    """All trackers of a run. Creating and closing it waits for a limited time; `log` returns at once."""

    def __init__(self, names: list[str], folder: Path, config: Mapping[str, Any]) -> None:
        from accelerate.state import PartialState
        from accelerate.utils import clear_environment

        # accelerate's trackers need its state. Hide the launcher's variables from it: as one of several ranks it would
        # open process groups and set the number of threads.
        with clear_environment():
            PartialState(cpu=True)
        self._ids = _RunIds(Path(folder).absolute() / _IDS)
        self._threads = [
            _TrackerThread(name, Path(folder).absolute(), config, self._ids) for name in names
        ]
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            if not thread.is_open.wait(START_S):
                logging.warning(
                    "%s: no answer within %d s; training begins without it", thread.name, START_S
                )

    def log(self, record: Mapping[str, Any]) -> None:
        """Send a record of `metrics.jsonl`, of a training step or a validation."""
        for thread in self._threads:
            thread.send(record)

    def close(self) -> None:
        """Wait until all records are sent, at most CLOSE_S without progress, and end the trackers' runs."""
        for thread in self._threads:
            thread.end()
        for thread in self._threads:
            for _ in range(_MOST_WAITS):
                num_sent = thread.num_sent
                thread.join(CLOSE_S)
                if thread.num_sent == num_sent:
                    break
            if thread.is_alive():
                logging.warning(
                    "%s: not all could be sent within %d s; the rest is lost", thread.name, CLOSE_S
                )


class _RunIds:
    """The file with the id of each tracker's run, so that a resumed run continues it; shared by the trackers' threads."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        self.known = found if isinstance(found, dict) else {}

    def keep(self, name: str, run_id: str) -> None:
        with self._lock:
            self.known[name] = run_id
            self._path.write_text(json.dumps(self.known) + "\n", encoding="utf-8")


class _TrackerThread(threading.Thread):
    """One tracker, started, fed and ended in this thread only, as MLflow and trackio require."""

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any], ids: _RunIds) -> None:
        super().__init__(name=name, daemon=True)
        self._folder, self._config = folder, config
        self._ids, self._records = ids, queue.Queue(_MOST_WAITING)
        self.num_sent, self._has_lost = 0, False
        self.is_open = threading.Event()  # also set if it failed to open
        # not imported in the thread: a worker forked during an import would wait for the import lock forever
        self._is_usable = self._try("cannot be imported", importlib.import_module, name)

    def send(self, record: Mapping[str, Any]) -> None:
        try:
            self._records.put_nowait(record)
        except queue.Full:
            if not self._has_lost:
                logging.warning(
                    "%s: slower than the training, or without an answer; it gets not all steps",
                    self.name,
                )
            self._has_lost = True

    def end(self) -> None:
        """Let the thread end after the records in its queue; a full queue loses one for the end mark, None."""
        try:
            self._records.put_nowait(None)
        except queue.Full:
            self._records.get_nowait()
            self._records.put_nowait(None)

    def run(self) -> None:
        if self._is_usable and self._try("cannot start", self._open):
            self.is_open.set()
            self._try("failed", self._work)
        self.is_open.set()

    def _open(self) -> None:
        run_id = self._ids.known.get(self.name)
        self._tracker, new_id = OPENERS[self.name](self._folder, run_id)
        if run_id is None:  # a continued run has the configuration already
            values = flat(self._config)
            # the TensorBoard tracker's own method makes a new folder at each start
            if self.name == "tensorboard":
                text = "\n".join(f"    {key}: {value}" for key, value in values.items())
                self._tracker.tracker.add_text("config", text)
            else:
                self._tracker.store_init_configuration(values)
            self._ids.keep(self.name, new_id)

    def _work(self) -> None:
        while (record := self._records.get()) is not None:
            self._tracker.log(tracked(record), step=record["step"])
            self.num_sent += 1
        self._tracker.finish()

    def _try(self, what: str, call: Callable, *args: Any) -> bool:
        """Return whether a call succeeded; an error is a warning that begins with the tracker's name and `what`."""
        try:
            call(*args)
            return True
        except Exception as error:  # of any kind: the tracker's library may raise anything
            reason = first_line(error)
            logging.warning("%s %s (%.300s); the run goes on without it", self.name, what, reason)
            return False


def tracked(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a record of `metrics.jsonl`, named like "train/loss" and "val/blank_loss"."""
    group = record.get("validation", "train")
    numbers = {}
    for key, value in record.items():
        if key != "step" and isinstance(value, int | float) and math.isfinite(value):
            numbers[f"{group}/{key}"] = value
    return numbers


def flat(tree: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return nested settings as {full key: value}, lists as text."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{where}{key}.")
        else:
            found[f"{where}{key}"] = str(value) if isinstance(value, list) else value
    return found


def _open_tensorboard(folder: Path, run_id: str | None) -> tuple[Any, str]:
    from accelerate.tracking import TensorBoardTracker

    tracker = TensorBoardTracker("", logging_dir=folder)
    tracker.start()
    return tracker, folder.name


def _open_wandb(folder: Path, run_id: str | None) -> tuple[Any, str]:
    """Open a W&B run: online, or, without a login or an answer of the server, offline in the run's folder."""
    import wandb
    from accelerate.tracking import WandBTracker

    run_id = run_id or uuid.uuid4().hex[:8]
    settings = wandb.Settings(init_timeout=_WANDB_START_S, console="off")
    options = {
        "name": folder.name,
        "id": run_id,
        "resume": "allow",
        "dir": str(folder),
        "settings": settings,
    }
    tracker = WandBTracker(os.environ.get("WANDB_PROJECT", folder.parent.name), **options)
    try:
        if not os.environ.get("WANDB_MODE"):
            # without prompt=False, which older versions lack, `login` may wait for input
            has_prompt = "prompt" in inspect.signature(wandb.login).parameters
            is_logged_in = wandb.login(prompt=False) if has_prompt else wandb.api.api_key
            if not is_logged_in:
                raise ValueError("no login, see `wandb login`")
        tracker.start()
    except Exception as error:  # of any kind: the library may raise anything
        reason = first_line(error)
        logging.warning(
            "wandb works offline (%s); later: wandb sync %s/wandb/offline-run-*", reason, folder
        )
        tracker.init_kwargs |= {"mode": "offline", "resume": None}
        tracker.start()
    return tracker, run_id


def _open_trackio(folder: Path, run_id: str | None) -> tuple[Any, str]:
    from accelerate.tracking import TrackioTracker

    tracker = TrackioTracker(folder.parent.name, name=folder.name, resume="allow", embed=False)
    tracker.start()
    return tracker, folder.name


def _open_mlflow(folder: Path, run_id: str | None) -> tuple[Any, str]:
    from accelerate.tracking import MLflowTracker

    # give up on a missing server after about a minute, not after many
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    tracker = MLflowTracker(folder.parent.name, run_id=run_id, run_name=folder.name)
    tracker.start()
    return tracker, tracker.active_run.info.run_id


OPENERS = {
    "wandb": _open_wandb,
    "tensorboard": _open_tensorboard,
    "trackio": _open_trackio,
    "mlflow": _open_mlflow,
}
