"""The run card: a record of a training run in its folder, `run_card.json`, for reading as `run_card.md`, with `loss.png`.

It is written when the run ends, also by a signal or an error. What fails in writing it is only a warning.
"""

import json
import logging
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from minigpt4.common.checkpoint import PARTIAL, remove
from minigpt4.common.cli import Interrupted
from minigpt4.common.dist_utils import get_world_size, is_main_process
from minigpt4.common.startup import startup
from minigpt4.common.utils import read_json, without_secrets
from minigpt4.common.versions import git_commit, hardware, versions
from minigpt4.models.part_hashes import frozen_tensors, part_hashes, tensor_hashes
from minigpt4.runners.curves import Metrics, loss_picture, read_metrics
from minigpt4.runners.report import SampleCounts, count_samples
from minigpt4.runners.run_card_text import card_text

NAME, PICTURE = "run_card", "loss.png"
FINISHED = "finished"  # the outcome of a run that did not fail
INTERRUPTED = "interrupted"  # begins the outcome of a run that a signal ended
_NUM_POINTS = 50  # of the curve, about
_FINAL_STEPS = 50  # whose mean is the final loss


class RunCard:
    """Context manager around the training of the runner `run`, whose folder is open; rank 0 writes the card at its end.

    Frozen tensors are hashed at the beginning and at the end: a difference means that frozen weights have changed.
    """

    def __init__(self, run: Any) -> None:
        self.run = run
        self.counts: SampleCounts | None = None  # of all ranks, once gathered
        self._frozen: dict[str, str] = {}  # {name of a frozen tensor: its hash at the beginning}
        self._start, self._started = time.time(), _now()

    def __enter__(self) -> "RunCard":
        if is_main_process():
            self._frozen = tensor_hashes(frozen_tensors(self.run.model))
        self._start = time.time()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if is_main_process():
            try:
                self._write(_outcome(error))
            # of any kind: the training is over, and its results are saved
            except Exception as problem:
                logging.warning(
                    "%s not written (%s: %.300s)", NAME, type(problem).__name__, problem
                )

    def _write(self, outcome: str) -> None:
        """Write the card's files."""
        folder, seconds = self.run.output_dir, time.time() - self._start
        try:
            metrics = read_metrics(folder).up_to(self.run.steps_done)
        except OSError:  # no step was trained, or the folder is lost
            metrics = Metrics([], [])
        if picture := loss_picture(f"{folder.parent.name} / {folder.name}", metrics):
            write_whole(folder / PICTURE, picture)
        card = plain(self._content(outcome, metrics, seconds, earlier_card(folder)))
        text = json.dumps(card, indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(folder / f"{NAME}.json", f"{text}\n".encode(errors="backslashreplace"))
        markdown = card_text(card, PICTURE if picture else None)
        write_whole(folder / f"{NAME}.md", markdown.encode(errors="backslashreplace"))

    def _content(
        self, outcome: str, metrics: Metrics, seconds: float, earlier: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the content of `run_card.json`; `earlier` is the card of the run's earlier processes."""
        run = self.run
        config = run.config.to_dict()
        process = self._process(outcome, metrics, seconds)
        return {
            "run": run.output_dir.name,
            "outcome": outcome,
            "recipe": {
                "command": command_line(),
                "resumed_from": _text(run.resumed_from),
                "config": config,
            },
            "model": self._model(config, earlier, is_over=not outcome.startswith(INTERRUPTED)),
            "data": self._data(config),
            "curve": curve(metrics.steps),
            "validation": metrics.validations,
            "result": {
                "final_loss": final_loss(metrics.steps),
                "samples_seen": metrics.steps[-1]["samples"] if metrics.steps else 0,
                "trained_sha256": part_hashes(tensor_hashes(run.model.trainable_state_dict())),
                "checkpoint": _text(run.last_checkpoint or run.resumed_from),
            },
            "processes": [*earlier.get("processes", []), process],
        }

    def _process(self, outcome: str, metrics: Metrics, seconds: float) -> dict[str, Any]:
        """Return the entry of this process; a resumed run has several."""
        first = self.run.start.epoch * self.run.iters_per_epoch + self.run.start.step
        own = [record for record in metrics.steps if record["step"] >= first]
        validations = [record for record in metrics.validations if record["step"] >= first]
        validation_seconds = sum(record.get("seconds") or 0 for record in validations)
        return {
            "started": self._started,
            "ended": _now(),
            "outcome": outcome,
            "steps": [own[0]["step"], own[-1]["step"]] if own else None,
            "seconds": {
                "start_up": round(sum(startup.seconds.values()), 1),
                "training": round(seconds, 1),
                "of_it_validation": round(validation_seconds, 1),
            },
            "ranks": get_world_size(),
            "device": str(self.run.device),
            "peak_memory_mib": own[-1]["memory_mib"] if own else None,
            "hardware": hardware(),
            "versions": versions() | {"commit": git_commit()},
        }

    def _model(
        self, config: dict[str, Any], earlier: dict[str, Any], is_over: bool
    ) -> dict[str, Any]:
        """Return sizes and hashes of the model's parts.

        An interrupted run has only seconds left: the hashes at the end are left to the process that resumes it, which
        compares them with those of the run's very beginning.
        """
        model = self.run.model
        before = part_hashes(self._frozen) | _hashes_before(earlier)
        if is_over:
            frozen, changed = self._compare_frozen(before)
        else:
            unknown = {"after": None, "unchanged": None}
            frozen = {part: {"before": digest, **unknown} for part, digest in before.items()}
            changed = []
        return {
            "arch": config.get("model", {}).get("arch", type(model).__name__),
            "parts": [part._asdict() for part in model.parts()],
            "frozen_sha256": frozen,
            "changed_tensors": changed,
            "files": {
                key: value for key, value in model.identity().items() if key in ("llm", "vision")
            },
        }

    def _compare_frozen(self, before: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
        """Return ({frozen part: its hashes}, changed tensors of this process); a change is also a warning."""
        tensors = frozen_tensors(self.run.model)
        after = tensor_hashes({name: tensors[name] for name in self._frozen if name in tensors})
        changed = [name for name in self._frozen if after.get(name) != self._frozen[name]]
        frozen, changed_parts = {}, []
        for part, now in part_hashes(after).items():
            is_same = before.get(part) == now
            frozen[part] = {"before": before.get(part), "after": now, "unchanged": is_same}
            if not is_same:
                changed_parts.append(part)
        if changed or changed_parts:
            names = ", ".join(changed[:5] or changed_parts)
            logging.warning("frozen weights are not what they were before training: %s", names)
        return frozen, changed

    def _data(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the source and size of each dataset, and what became of its samples."""
        counts = self.counts or count_samples(self.run, of_all_ranks=False)
        data = {}
        for name, splits in self.run.datasets.items():
            if "train" not in splits:
                continue
            dataset, section = splits["train"], config.get("datasets", {}).get(name, {})
            # counted in records if it knows their number, else in files
            records = len(dataset) if hasattr(dataset, "__len__") else None
            listing = dataset.listing() if hasattr(dataset, "listing") else None
            data[name] = {
                "source": section.get("build_info"),
                "sha": getattr(dataset, "fingerprint", None),
                "records": records,
                "files": len(listing) if listing is not None and records is None else None,
                "sample_ratio": getattr(dataset, "sample_ratio", None),
                **counts.of_dataset.get(name, {}),
                "counted_on_ranks": counts.num_ranks,
                "ranks": get_world_size(),
            }
        return data


def _hashes_before(card: Mapping[str, Any]) -> dict[str, str]:
    """Return {frozen part: its hash at the beginning of the run} that a card holds."""
    frozen = card.get("model", {}).get("frozen_sha256", {})
    return {part: found["before"] for part, found in frozen.items()}


def earlier_card(folder: Path) -> dict[str, Any]:
    """Return the card of the run's earlier processes; {} if there is none, or none that can be used."""
    try:
        card = read_json(folder / f"{NAME}.json")
        _hashes_before(card), list(card["processes"])  # raises an error if malformed
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return card


def is_final(card: Mapping[str, Any], checkpoint: Path) -> bool:
    """Return whether a card is that of a run that finished with this checkpoint."""
    named = (card.get("result") or {}).get("checkpoint") or ""
    return card.get("outcome") == FINISHED and Path(named).name == checkpoint.name


def curve(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the first, last and lowest loss, and about 50 points, each the mean loss since the point before it."""
    known = [(record["step"], record["loss"]) for record in steps if record["loss"] is not None]
    if not known:
        return {"steps": len(steps), "first": None, "last": None, "lowest": None, "points": []}
    every = math.ceil(len(known) / _NUM_POINTS)
    points = []
    for start in range(0, len(known), every):
        part = known[start : start + every]
        points.append([part[-1][0], round(math.fsum(loss for _, loss in part) / len(part), 6)])
    lowest = min(known, key=lambda point: point[1])
    return {
        "steps": len(steps),
        "first": known[0],
        "last": known[-1],
        "lowest": lowest,
        "points": points,
    }


def final_loss(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the mean loss of the last steps as {"mean", "steps": their number}, None without any."""
    losses = [record["loss"] for record in steps if record["loss"] is not None][-_FINAL_STEPS:]
    return {"mean": math.fsum(losses) / len(losses), "steps": len(losses)} if losses else None


def command_line() -> str:
    """Return the command that started this process, its URLs without user, password and query."""
    return shlex.join(
        re.sub(r"(?i)https?://\S+", lambda address: without_secrets(address[0]), word)
        for word in sys.argv
    )


def plain(value: Any) -> Any:
    """Return `value` in the types of strict JSON: numbers that are not finite become null, other types text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file completely or, with a warning, not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        logging.warning("%s not written (%s)", path, error)
        remove(partial)


def _outcome(error: BaseException | None) -> str:
    if error is None:
        return FINISHED
    if isinstance(error, Interrupted):
        return f"{INTERRUPTED}: {error}"
    first_line = str(error).splitlines()[0] if str(error) else ""
    return f"failed: {type(error).__name__}: {first_line}"[:500]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
