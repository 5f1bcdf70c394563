"""The state of a run at a step: saved, compared and restored, so that a resumed run is bit-exact."""

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

# Patterns of settings that a resume may change: they change no number of the training, or `setup` compares their content.
_CHANGEABLE_KEYS = (
    r"run\.(output_dir|resume_ckpt_path|resume_mode|save_every_iters|keep_last_k|log_freq|report_to|tensorboard)",
    r"run\.(max_epoch|iters_per_epoch)",  # epochs may be added; `setup` has the steps of an epoch
    r"run\.(evaluate|valid_splits|test_splits|batch_size_eval|max_bad_fraction|max_skipped_updates)",
    r"run\.(eval_every_iters|eval_controls|eval_samples|best_metric)",
    r"run\.(device|distributed|dist_url|dist_timeout_s|step_timeout_s|world_size|read_ahead)",
    r"run\.(shard_cache|shard_cache_gb)",
    r"run\.shard_llm",  # only where the weights are
    r"run\.(dist_backend|rank|gpu)",  # written into checkpoints by other programs
    r"imports|env\..+|datasets\.[^.]+\.(build_info|val)\..+",
    r"model\.(llm|vision\.\w+)\.name|model\.(llama_model|vision_model|vit_ckpt|q_former_model|ckpt|prompt_path)",
    r"model\.(device_8bit|device_map|check_llm|reads_boxes)",
)
# Pattern of settings that older checkpoints may lack: those now taken from the vision tower, whose values have not
# changed; the tower's files; parts of which there was only one kind.
_NEWER_KEYS = (
    r"datasets\.[^.]+\.vis_processor\.\w+\.(mean|std)|model\.(vision|composition|train)\..+"
)
_NEWER_KEYS += r"|model\.(bridge|projector|vision_model)"
# Pattern of settings that decide what a validation measures; training files may have moved.
_VALIDATION_KEYS = (
    r"run\.eval_controls|datasets\.[^.]+\.(val|val_fraction|(vis|text)_processor)(\..+)?"
)
_MOST_LINES = 40  # of differences in one message


class Position(NamedTuple):
    """The next step to train, counted from 0."""

    epoch: int
    step: int

    @classmethod
    def after_epoch(cls, epoch: int) -> "Position":
        """Return the position after a finished epoch, for -1 the beginning. Raises ValueError for any other number."""
        if int(epoch) != epoch or epoch < -1:
            raise ValueError(f"epoch {epoch}")
        return cls(int(epoch) + 1, 0)


@dataclass(frozen=True)
class Progress:
    """The state of a run before a step: what a checkpoint has under `progress`, and its `config`."""

    position: Position
    setup: dict[str, Any]  # what, besides the configuration, must be the same for an exact resume
    ranks: list[dict[str, Any]]  # per rank: "rng", "data", "metrics", accumulated "gradients"
    identity: dict[str, Any]  # the model that the weights fit: `BaseModel.identity()`
    stats: dict[str, float] | None  # at the end of an epoch: its means, for log.txt
    config: dict[str, Any]
    best: dict[str, Any] | None = None  # the best validation so far: "metric", "value", "step"

    mine = property(lambda self: self.ranks[get_rank()])  # the state of this rank
    samples_seen = property(lambda self: self.ranks[0]["metrics"]["samples_seen"])  # on all ranks
    data_seed = property(lambda self: (self.ranks[0]["data"] or {}).get("seed"))

    @classmethod
    def of_run(cls, run: Any, position: Position, metrics: dict, stats: dict | None) -> "Progress":
        """Return the progress of the runner `run` before a step. Called by all ranks."""
        gradients = [parameter.grad for parameter in run.trainable]
        has_gradients = any(gradient is not None for gradient in gradients)
        loader = run.train_loader
        mine = {
            # an epoch begins with seeds of its own
            "rng": _rng_state(run.device) if position.step else None,
            "data": loader.state() if hasattr(loader, "state") else None,
            "metrics": metrics,
            "gradients": gradients if has_gradients else None,
        }
        return cls(
            position=position,
            setup=_setup(run),
            ranks=gather_from_ranks(mine),
            identity=run.model.identity(),
            stats=stats,
            config=run.config.to_dict(),
            best=run.validation.best,
        )

    @classmethod
    def of_checkpoint(cls, state: dict[str, Any]) -> "Progress | None":
        """Return the progress that a checkpoint holds; None if it has none, as those of other programs.

        Raises an error of any kind if it is malformed.
        """
        if "progress" not in state:
            return None
        saved = state["progress"]
        position, stats = Position(**saved["position"]), saved["stats"] or {}
        if not all(type(number) is int and number >= 0 for number in position):
            raise ValueError(f"position {position}")
        # everything that is used as a number must be one
        numbers = [*stats.values()]
        if best := saved.get("best"):  # absent in older checkpoints
            numbers += [best["value"], best["step"]]
        for rank in saved["ranks"]:
            metrics, data = rank["metrics"], rank["data"] or {}
            numbers += [metrics[name] for name in ("lr_sum", "samples_seen", "skipped", "in_a_row")]
            numbers += [*metrics["losses"], data.get("seed", 0)]
        if not all(isinstance(number, int | float) for number in numbers) or not saved["ranks"]:
            raise TypeError("a value that must be a number is not one")
        return cls(**saved | {"position": position}, config=state["config"])

    def to_plain(self) -> dict[str, Any]:
        """Return the content of `progress` in a checkpoint, in plain containers."""
        plain = {**vars(self), "position": self.position._asdict()}
        del plain["config"]
        return plain

    def differences(self, run: Any) -> list[str]:
        """Return the differences that keep `run` from an exact resume here, as lines that begin with the key."""
        theirs = _comparable(self.config, self.setup, self.identity)
        ours = _comparable(run.config.to_dict(), _setup(run), run.model.identity())
        lines = []
        for key in theirs | ours:
            own, saved = ours.get(key), theirs.get(key)
            if own == saved or any(re.fullmatch(pattern, key) for pattern in _CHANGEABLE_KEYS):
                continue
            # a setting that the program that wrote the checkpoint did not have
            is_newer = key.startswith("run.") and key not in theirs
            is_newer |= saved is None and re.fullmatch(_NEWER_KEYS, key) is not None
            if not is_newer:
                lines.append(f"{key:.200}: {own!r:.80}, the checkpoint has {saved!r:.80}")
        if len(lines) > _MOST_LINES:
            return [*lines[:_MOST_LINES], f".. and {len(lines)} in all"]
        return lines

    def validates_alike(self, run: Any) -> bool:
        """Return whether `run` has the settings that decide what a validation here measures."""
        ours, theirs = _flat(run.config.to_dict()), _flat(self.config)
        return all(
            ours.get(key) == theirs.get(key)
            for key in ours | theirs
            if re.fullmatch(_VALIDATION_KEYS, key)
        )

    def check_settings(self, run: Any) -> None:
        """Raise CheckpointError that lists the differences if `run` cannot be resumed here exactly."""
        if lines := self.differences(run):
            raise CheckpointError(
                f"run.resume_ckpt_path: '{run.resumed_from}' is of a run with other settings and cannot be resumed "
                "exactly:\n"
                + "\n".join(f"  {line}" for line in lines)
                + "\nStart it as it was; or, to take over "
                "weights, optimizer and schedule and let the data begin anew, --options run.resume_mode=restart"
            )

    def restore(self, run: Any) -> dict[str, Any]:
        """Restore this rank's random generators and accumulated gradients; return the state of its metrics."""
        gradients = self.mine["gradients"] or [None] * len(run.trainable)
        for parameter, gradient in zip(run.trainable, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
        if self.mine["rng"]:
            _set_rng_state(self.mine["rng"], run.device)
        return self.mine["metrics"]


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Restore the state of all random generators after the block, whatever it draws or seeds."""
    state = _rng_state(device)
    try:
        yield
    finally:
        _set_rng_state(state, device)


def _setup(run: Any) -> dict[str, Any]:
    """Return what, besides the configuration, must be the same for an exact resume."""
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


def _comparable(config: dict, setup: dict, identity: dict) -> dict[str, Any]:
    """Return {full key: value} of all that is compared; different spellings of one setting become the same."""
    flat = _flat(config) | _flat(setup) | _flat({"model": identity})
    if (flat.get("run.accum_grad_iters"), flat.get("world size")) == (1, 1):
        flat.pop("run.accum_reduction", None)  # for one batch, all reductions are the same
    # None on a CPU, absent in older checkpoints: both mean False
    for name in ("model.compile", "model.cuda_graphs"):
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
