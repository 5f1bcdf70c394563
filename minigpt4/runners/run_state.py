"""What a run is at a step, as plain values: saved, compared and restored, so that what follows is the same bit by bit.

Under `progress` in a checkpoint, absent from those of other programs:

    position   {"epoch", "step"}: the next step to be made, counted from 0
    setup      what must be the same for the run to go on exactly, beside the configuration
    ranks      one dict a rank: random generators, place in the data, losses of the epoch, gradients not yet stepped
    identity   the LLM and the template that the weights were trained for (`BaseModel.identity`)
    stats      at the end of an epoch: its means, for a line of log.txt that may not have been written any more
"""

import random
import re

import numpy as np
import torch

from minigpt4.common.dist_utils import gather_from_ranks, get_rank, get_world_size

# Settings that may change without changing a number of the training, or that `setup` compares by content.
_FREE_KEYS = (
    r"run\.(output_dir|resume_ckpt_path|resume_mode|save_every_iters|keep_last_k|log_freq|tensorboard)",
    r"run\.(max_epoch|iters_per_epoch)",  # more epochs are wanted; the steps of one are in `setup`
    r"run\.(evaluate|valid_splits|test_splits|batch_size_eval|max_bad_fraction|max_skipped_updates)",
    r"run\.(device|distributed|dist_url|dist_timeout_s|step_timeout_s|dist_backend|world_size|rank|gpu)",
    r"imports|env\..+|datasets\.\w+\.(build_info|val)\..+",
    r"model\.llm\.name|model\.(llama_model|vit_ckpt|q_former_model|ckpt|device_8bit|check_llm|prompt_path)",
)
# Settings that checkpoints of before lack; they are now taken from the vision tower, whose files did not change.
_FILLED_KEYS = r"datasets\.\w+\.vis_processor\.\w+\.(mean|std)"


def progress(run, epoch, step, metrics_state, stats=None):
    """Return what a checkpoint holds of `run` before step (epoch, step), on every rank. Called by all ranks."""
    gradients = [parameter.grad for parameter in run.trainable]
    mine = {
        "rng": _rng_state(run.device) if step else None,  # every epoch begins with seeds of its own
        "data": run.train_loader.state() if hasattr(run.train_loader, "state") else None,
        "metrics": metrics_state,
        "gradients": None if all(gradient is None for gradient in gradients) else gradients,
    }
    return {
        "position": {"epoch": epoch, "step": step},
        "setup": _setup(run),
        "ranks": gather_from_ranks(mine),
        "identity": run.model.identity(),
        "stats": stats,
    }


def differences(saved, config, run):
    """Return what keeps `run` from going on exactly where a checkpoint stands, as lines that begin with the key.

    `saved`, `config`: what the checkpoint has under `progress` and `config`.
    """
    theirs, ours = _flat(config), _flat(run.config.to_dict())
    theirs, ours = theirs | _flat(saved["setup"]), ours | _flat(_setup(run))
    theirs |= _flat({"model": saved["identity"]})
    ours |= _flat({"model": run.model.identity()})
    lines = []
    for key in theirs | ours:
        is_new = key not in theirs and key.startswith("run.")  # a key that the program did not know then
        is_new |= theirs.get(key) is None and re.fullmatch(_FILLED_KEYS, key) is not None
        if theirs.get(key) != ours.get(key) and not is_new and not any(re.fullmatch(free, key) for free in _FREE_KEYS):
            lines.append(f"{key}: {ours.get(key)!r:.80}, the checkpoint has {theirs.get(key)!r:.80}")
    return lines


def restore(run, saved):
    """Put random generators and gradients of this rank back to where `saved` has them; return the metrics' state."""
    mine = saved["ranks"][get_rank()]
    for parameter, gradient in zip(run.trainable, mine["gradients"] or (), strict=bool(mine["gradients"])):
        parameter.grad = None if gradient is None else gradient.to(parameter.device)
    if mine["rng"]:
        _set_rng_state(mine["rng"], run.device)
    return mine["metrics"]


def _setup(run):
    train = [splits["train"] for splits in run.datasets.values() if "train" in splits]
    return {
        "world size": get_world_size(),
        "device": run.device.type,
        "steps an epoch": run.iters_per_epoch,
        "listing": {f"datasets.{dataset.name}": dataset.fingerprint for dataset in train},
    }


def _rng_state(device):
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _set_rng_state(state, device):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def _flat(tree, where=""):
    """Return {full key: value} of the leaves of nested dicts."""
    if not isinstance(tree, dict):
        return {where: tree}
    return {key: leaf for name, node in tree.items() for key, leaf in _flat(node, f"{where}.{name}".strip(".")).items()}
