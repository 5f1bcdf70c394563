"""Checkpoints written or changed by another program are used, or refused in a message that names key and file."""

import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from minigpt4.common.cli import run_program
from tests.training import batches, endless, runner, settings, trained


def nested(depth):
    tree = {}
    for _ in range(depth):
        tree = {"a": tree}
    return tree


JUNK = [
    None,
    [],
    {},
    "x",
    "",
    -1,
    2**70,
    0.5,
    math.nan,
    True,
    torch.zeros(2),
    torch.tensor(math.inf),
    [[1]],
    (1, 2),
]
JUNK += [{"a": 1}, {1: 2}, {None: None}, b"x", nested(300), list(range(10_000)), "long " * 10_000]


def places(tree, where=()):
    """Yield the path of every node of a tree of dicts, lists and tuples, down to its tensors and numbers."""
    children = ()
    if isinstance(tree, dict):
        children = tree.items()
    elif isinstance(tree, list | tuple):
        children = enumerate(tree)
    # not all of the hundreds of numbers in the state of a random generator
    for name, child in list(children)[:40]:
        yield (*where, name)
        yield from places(child, (*where, name))


def changed(tree, where, junk):
    """Return a copy of a tree with the node at `where` replaced by `junk`, or, if `junk` is `places`, removed."""
    if not where:
        return junk
    name, *rest = where
    if isinstance(tree, tuple):
        return tuple(changed(list(tree), where, junk))
    tree = copy.copy(tree)
    if not rest and junk is places:
        del tree[name]
    else:
        tree[name] = changed(tree[name], rest, junk)
    return tree


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Two checkpoints, one with accumulated gradients, one within an epoch, and the settings of their run."""
    folder = tmp_path_factory.mktemp("good")
    changes = {
        "accum_grad_iters": 2,
        "accum_reduction": "sum",
        "iters_per_epoch": 5,
        "max_epoch": 2,
    }
    run = trained(folder, save_every_iters=2, **changes)
    paths = [run.output_dir / name for name in ("checkpoint_0.pth", "checkpoint_1_iter_4.pth")]
    states = [torch.load(path, weights_only=True) for path in paths]
    assert (
        states[0]["progress"]["ranks"][0]["gradients"] and states[1]["progress"]["ranks"][0]["rng"]
    )
    return states, changes


def resumed(state, path, **changes):
    """Return the exit code of a run that resumes from `state`."""
    torch.save(state, path)
    run = runner(settings(path.parent / "out", resume_ckpt_path=str(path), **changes))
    return run_program(lambda: run.train(endless(batches())))


@hypothesis_settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(data=st.data())
def test_a_changed_checkpoint_is_taken_or_refused(tmp_path, good, capsys, data):
    states, changes = good
    state = data.draw(st.sampled_from(states))
    state = {
        key: state[key] for key in state if key != data.draw(st.sampled_from([None, "progress"]))
    }
    where = data.draw(st.sampled_from([*places(state)]))
    state = changed(state, where, data.draw(st.sampled_from([places, *JUNK])))
    capsys.readouterr()
    code = resumed(state, tmp_path / "changed.pth", **changes)
    said = capsys.readouterr().err
    assert code in (0, 1) and "Traceback" not in said
    if code:
        assert (
            said.startswith(("error: run.resume_ckpt_path: ", "error: step ")) and len(said) < 6000
        )
