"""Recorded functions: emulated on a CPU, and on a GPU where there is one.

tests/counting_gpu records too; tests/models/test_recorded_steps.py records training steps.
"""

import copy
import itertools

import pytest
import torch

from minigpt4.common.cuda_graphs import Recorder
from tests.common.emulated_graphs import emulated


@pytest.fixture(params=["cpu", "cuda"])
def device(request, monkeypatch):
    """A device on which Recorders record."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        yield "cuda"
        return
    with emulated(monkeypatch):
        yield "cpu"


def sines(x, scale):
    return (x * scale).sin()


def test_without_a_gpu_functions_run_as_they_are():
    recorder, x = Recorder(), torch.rand(3, requires_grad=True)
    for _ in range(3):
        found = recorder("sines", sines, x, torch.ones(3))
        assert torch.equal(found, x.sin()) and found.requires_grad
    assert recorder.calls == 0 and copy.deepcopy(recorder) is not recorder


def test_a_replay_gives_values_and_gradients(device):
    recorder = Recorder()
    for number in range(4):
        x = torch.rand(1000, device=device, requires_grad=True)
        scale = torch.rand(1000, device=device)
        found = recorder("sines", sines, x, scale)
        found.sum().backward()
        gradient, x.grad = x.grad, None
        expected = sines(x, scale)
        expected.sum().backward()
        assert torch.equal(found, expected) and torch.equal(gradient, x.grad)
        assert recorder.calls == number  # the second call records


def test_shapes_take_turns(device):
    """Each has a recording of its own, with a gradient and without one."""
    recorder, shapes = Recorder(), [(5,), (3, 4), (5,), (2, 1), (3, 4), (2, 1)] * 3
    for shape in shapes:
        x = torch.rand(shape, device=device, requires_grad=True)
        scale = torch.rand(shape, device=device)
        with torch.no_grad():
            assert torch.equal(recorder("sines", sines, x, scale), sines(x, scale))
        recorder("sines", sines, x, scale).sum().backward()
        assert torch.equal(x.grad, (x * scale).cos().detach() * scale)
    assert len(recorder._recordings) == 6 and recorder.calls == 2 * len(shapes) - 6


def test_what_changes_from_call_to_call_is_not_recorded(device, caplog):
    recorder, numbers = Recorder(), itertools.count(1)
    x = torch.ones(4, device=device)
    for _ in range(3):
        recorder("counting", lambda x: x * next(numbers), x)
    assert recorder.is_off and "a recorded step differs from the step itself" in caplog.text


def test_a_value_computed_outside_the_graph_is_found(device, caplog):
    """It fits the recorded call alone."""
    recorder, kept = Recorder(), {}

    def scaled(x, scale):
        if kept.get("of") is not scale:  # as at the first of several calls with one tensor
            kept.update(of=scale, double=scale * 2)
        return x * kept["double"]

    for number in range(1, 4):
        scale = torch.full((4,), float(number), device=device)
        found = recorder("scaled", scaled, torch.ones(4, device=device), scale)
        assert found.tolist() == [2 * number] * 4
    assert recorder.is_off and "a recorded step differs from the step itself" in caplog.text


def test_another_forward_pass_before_backward_is_refused(device):
    recorder, x = Recorder(), torch.rand(4, device=device, requires_grad=True)
    outputs = [recorder("sines", sines, x, x.detach()).sum() for _ in range(3)]
    outputs[2].backward()
    with pytest.raises(RuntimeError, match=r"^model.cuda_graphs: backward\(\) came after another"):
        outputs[1].backward()


def test_a_second_backward_is_refused(device):
    recorder, x = Recorder(), torch.rand(4, device=device, requires_grad=True)
    outputs = [recorder("sines", sines, x, x.detach()).sum() for _ in range(2)]
    outputs[1].backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"^model.cuda_graphs: backward\(\) came a second time"):
        outputs[1].backward()


@pytest.mark.parametrize("error", [RuntimeError("no\nroom"), ValueError(), MemoryError("full")])
def test_a_failure_ends_recording_alone(device, error, caplog):
    recorder, runs = Recorder(), itertools.count(1)

    def function(x):
        if next(runs) == 4:  # after a plain call and two that warm up: the capture
            raise error
        return x.sin()

    x = torch.rand(4, device=device, requires_grad=True)
    for _ in range(3):
        found = recorder("fails", function, x)
        assert torch.equal(found, x.sin()) and found.requires_grad
    said = (str(error) or type(error).__name__).splitlines()[0]
    assert recorder.is_off and f"steps are not recorded: {said}" in caplog.text
