"""What a run is at a step: saved, compared and restored, so that a resumed run is bit-exact."""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from minigpt4.common.checkpoint import CheckpointError
from minigpt4.common.device import run_precision
from minigpt4.common.dist_utils import gather_from_ranks, get_rank, get_world_size

# Settings that change no number of the training, or that `setup` compares by content.
_FREE_KEYS = (
    r"run\.(output_dir|resume_ckpt_path|resume_mode|save_every_iters|keep_last_k|log_freq|report_to|tensorboard)",
    r"run\.(max_epoch|iters_per_epoch)",  # more epochs are wanted; the steps of one are in `setup`
    r"run\.(evaluate|valid_splits|test_splits|batch_size_eval|max_bad_fraction|max_skipped_updates)",
    r"run\.(eval_every_iters|eval_controls|eval_samples|best_metric)",
    r"run\.(device|distributed|dist_url|dist_timeout_s|step_timeout_s|world_size|read_ahead)",
    r"run\.(shard_cache|shard_cache_gb)",
    r"run\.shard_llm",  # where the weights lie
    r"run\.(dist_backend|rank|gpu)",  # in checkpoints of programs that wrote them
    r"imports|env\..+|datasets\.[^.]+\.(build_info|val)\..+",
    r"model\.(llm|vision\.\w+)\.name|model\.(llama_model|vision_model|vit_ckpt|q_former_model|ckpt|prompt_path)",
    r"model\.(device_8bit|device_map|check_llm|reads_boxes)",
)
# What older checkpoints lack: settings that are now taken from the vision tower, as it always was; its files; parts
# that had no choice.
_FILLED_KEYS = (
    r"datasets\.[^.]+\.vis_processor\.\w+\.(mean|std)|model\.(vision|composition|train)\..+"
)
_FILLED_KEYS += r"|model\.(bridge|projector|vision_model)"
_MOST_LINES = 40  # that a message lists


class Position(NamedTuple):
    """The next step to be made, counted from 0."""

    epoch: int
    step: int

    @classmethod
    def after_epoch(cls, epoch: int) -> "Position":
        """Return that behind a finished epoch; -1: the beginning."""
        if int(epoch) != epoch or epoch < -1:
            raise ValueError(f"epoch {epoch}")
        return cls(int(epoch) + 1, 0)


@dataclass(frozen=True)
class Progress:
    """How far a run is; what is under `progress` in a checkpoint, and the `config` beside it."""

    position: Position
    setup: dict[str, Any]  # what must be the same for an exact resume, beside the configuration
    ranks: list[dict[str, Any]]  # each one's "rng", "data", "metrics", and "gradients" not yet used
    identity: dict[str, Any]  # what the weights are for: `BaseModel.identity()`
    stats: dict[str, float] | None  # means of an epoch at its end, for log.txt
    config: dict[str, Any]
    best: dict[str, Any] | None = None  # the best validation so far: "metric", "value", "step"

    mine = property(lambda self: self.ranks[get_rank()])
    samples_seen = property(lambda self: self.ranks[0]["metrics"]["samples_seen"])  # by all ranks
    data_seed = property(lambda self: (self.ranks[0]["data"] or {}).get("seed"))  # of the loader

    @classmethod
    def of_run(cls, run: Any, position: Position, metrics: dict, stats: dict | None) -> "Progress":
        """Return the progress of the runner `run` before a step. Called by all ranks."""
        gradients = [parameter.grad for parameter in run.trainable]
        mine = {
            "rng": _rng_state(run.device)
            if position.step
            else None,  # an epoch begins with own seeds
            "data": run.train_loader.state() if hasattr(run.train_loader, "state") else None,
            "metrics": metrics,
            "gradients": None if all(gradient is None for gradient in gradients) else gradients,
        }
        identity, config = run.model.identity(), run.config.to_dict()
        return cls(
            position,
            _setup(run),
            gather_from_ranks(mine),
            identity,
            stats,
            config,
            run.validation.best,
        )

    @classmethod
    def of_checkpoint(cls, state: dict[str, Any]) -> "Progress | None":
        """Return what a checkpoint says, None if it is of another program.

        Raises an error of any kind if what it says is malformed.
        """
        if "progress" not in state:
            return None
        saved = state["progress"]
        position, stats = Position(**saved["position"]), saved["stats"] or {}
        if not all(type(number) is int and number >= 0 for number in position):
            raise ValueError(f"position {position}")
        best = saved.get("best")  # absent in older checkpoints
        numbers = [*stats.values(), *([best["value"], best["step"]] if best else ())]
        for rank in saved["ranks"]:
            metrics, data = rank["metrics"], rank["data"] or {}
            numbers += [metrics[name] for name in ("lr_sum", "samples_seen", "skipped", "in_a_row")]
            numbers += [*metrics["losses"], data.get("seed", 0)]
        if not all(isinstance(number, int | float) for number in numbers) or not saved["ranks"]:
            raise TypeError("a number is none")
        return cls(**saved | {"position": position}, config=state["config"])

    def to_plain(self) -> dict[str, Any]:
        """Return what a checkpoint has under `progress`, plain containers."""
        plain = {**vars(self), "position": self.position._asdict()}
        del plain["config"]
        return plain

    def differences(self, run: Any) -> list[str]:
        """Return what keeps `run` from resuming here exactly, as lines that begin with the key."""
        theirs = _compared(self.config, self.setup, self.identity)
        ours = _compared(run.config.to_dict(), _setup(run), run.model.identity())
        lines = []
        for key in theirs | ours:
            is_new = key not in theirs and key.startswith("run.")  # unknown to the program then
            is_new |= theirs.get(key) is None and re.fullmatch(_FILLED_KEYS, key) is not None
            is_free = is_new or any(re.fullmatch(free, key) for free in _FREE_KEYS)
            if theirs.get(key) != ours.get(key) and not is_free:
                lines.append(
                    f"{key:.200}: {ours.get(key)!r:.80}, the checkpoint has {theirs.get(key)!r:.80}"
                )
        return (
            lines
            if len(lines) <= _MOST_LINES
            else [*lines[:_MOST_LINES], f".. and {len(lines)} in all"]
        )

    def check_settings(self, run: Any) -> None:
        """Raise CheckpointError, with what differs, if `run` cannot be resumed here exactly."""
        if lines := self.differences(run):
            raise CheckpointError(
                f"run.resume_ckpt_path: '{run.resumed_from}' is of a run with other settings and cannot be resumed "
                "exactly:\n"
                + "\n".join(f"  {line}" for line in lines)
                + "\nStart it as it was; or, to take over "
                "weights, optimizer and schedule and let the data begin anew, --options run.resume_mode=restart"
            )

    def restore(self, run: Any) -> dict[str, Any]:
        """Put this rank's random generators and gradients back; return the state of its metrics."""
        gradients = self.mine["gradients"] or [None] * len(run.trainable)
        for parameter, gradient in zip(run.trainable, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        if self.mine["rng"]:
            _set_rng_state(self.mine["rng"], run.device)
        return self.mine["metrics"]


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Keep random numbers drawn and seeds set within the block from having an effect behind it."""
    state = _rng_state(device)
    try:
        yield
    finally:
        _set_rng_state(state, device)


def _setup(run: Any) -> dict[str, Any]:
    train = [splits["train"] for splits in run.datasets.values() if "train" in splits]
    return {
        "world size": get_world_size(),
        "device": run.device.type,
        "steps an epoch": run.iters_per_epoch,
        "listing": {f"datasets.{dataset.name}": dataset.fingerprint for dataset in train},
    }


def _rng_state(device: torch.device) -> dict[str, Any]:
    state = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (state[0], state[1].tolist(), *state[2:]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def _compared(config: dict, setup: dict, identity: dict) -> dict[str, Any]:
    """Return {full key: value} of all that is compared, precision as the run resolves it."""
    flat = _flat(config) | _flat(setup) | _flat({"model": identity})
    if (flat.get("run.accum_grad_iters"), flat.get("world size")) == (1, 1):
        flat.pop("run.accum_reduction", None)  # of one batch, all are the same
    for name in ("model.compile", "model.cuda_graphs"):  # None: on a CPU; before, there was none
        flat[name] = bool(flat.get(name))
    if precision := flat.get("model.llm_precision"):  # saved as "auto" or resolved
        flat["model.llm_precision"] = run_precision(
            precision, flat["run.amp"], flat["run.amp_dtype"]
        )
    return flat


def _flat(tree: Any, where: str = "") -> dict[str, Any]:
    """Return {full key: value} of the leaves of nested dicts."""
    if not isinstance(tree, dict):
        return {where: tree}
    flat = {}
    for name, node in tree.items():
        flat |= _flat(node, f"{where}.{name}".strip("."))
    return flat
