"""Checkpoints and files of weights that are damaged in one known way each; makers as in damage.py."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from tests.survival.damage import Maker, Place, Trap, cut_at, shards
from tests.survival.kill import newest


def weights(change: Callable[[dict], object]) -> Maker:
    """`model.ckpt`: the weights of a finished run after `change(state)`, which may return another object."""

    def make(place):
        path = place.folder / "weights.pth"
        state = torch.load(newest(place.finished()), weights_only=True)
        torch.save(change(state) or state, path)
        return shards()(place) | {"model.ckpt": str(path)}

    return make


def a_nan(state: dict) -> None:
    """One number of the weights is not a number."""
    state["model"]["llama_proj.weight"][3, 5] = float("nan")


def narrow(state: dict) -> None:
    """The weights are those for a narrower LLM."""
    state["model"] = {name: tensor[:64] for name, tensor in state["model"].items()}


def trap_as_weights(key: str) -> Maker:
    """The file of a setting runs code where it is unpickled."""

    def make(place):
        path = place.folder / "weights.pth"
        path.write_bytes(pickle.dumps({"model": Trap(place.folder / "executed")}))
        return shards()(place) | {key: str(path)}

    return make


def resumed(change: Callable[[list[Path]], object] | None = None, **settings) -> Maker:
    """A copy of the finished run, resumed for a second epoch; `change(checkpoints, oldest first)` damages it."""

    def make(place):
        shutil.copytree(place.finished(), place.folder / "out")
        if change:
            change(
                sorted(
                    place.folder.glob("out/*/*.pth"), key=lambda path: len(path.name), reverse=True
                )
            )
        return shards()(place) | {"run.resume_ckpt_path": "auto", "run.max_epoch": 2} | settings

    return make


def other_shards(place: Place) -> dict:
    """A finished run is resumed with one shard more."""
    more = shards(number=4)(place)
    return resumed()(place) | more


def damage_newest(paths: list[Path]) -> None:
    """Cut the last of these files at half."""
    cut_at(0.5)(paths[-1])


def flip_a_byte(paths: list[Path]) -> None:
    """Change one bit of the last of these files."""
    content = bytearray(paths[-1].read_bytes())
    content[len(content) // 2] ^= 1
    paths[-1].write_bytes(content)


def damage_all(paths: list[Path]) -> None:
    """Cut all of these files at half."""
    for path in paths:
        cut_at(0.5)(path)
