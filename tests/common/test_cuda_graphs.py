"""Recorded functions; where there is no GPU, tests/counting_gpu counts them and the model's tests cover the rounding."""

import copy
import itertools

import pytest
import torch

from minigpt4.common.cuda_graphs import Recorder

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def sines(x, scale):
    return (x * scale).sin()


def test_without_a_gpu_functions_run_as_they_are():
    recorder, x = Recorder(), torch.rand(3, requires_grad=True)
    for _ in range(3):
        found = recorder("sines", sines, x, torch.ones(3))
        assert torch.equal(found, x.sin()) and found.requires_grad
    assert recorder.calls == 0 and copy.deepcopy(recorder) is not recorder


@on_gpu
def test_a_replay_gives_values_and_gradients():
    recorder, scale = Recorder(), torch.rand(1000, device="cuda")
    for number in range(4):
        x = torch.rand(1000, device="cuda", requires_grad=True)
        recorder("sines", sines, x, scale).sum().backward()
        found, x.grad = x.grad, None
        sines(x, scale).sum().backward()
        assert torch.equal(found, x.grad)
        assert recorder.calls == max(0, number)  # the second call records


@on_gpu
def test_what_changes_from_call_to_call_is_not_recorded(caplog):
    recorder, numbers = Recorder(), itertools.count(1)
    x = torch.ones(4, device="cuda")
    for _ in range(3):
        recorder("counting", lambda x: x * next(numbers), x)
    assert recorder.is_off and "a recorded step differs from the step itself" in caplog.text


@on_gpu
def test_another_forward_pass_before_backward_is_refused():
    recorder, x = Recorder(), torch.rand(4, device="cuda", requires_grad=True)
    outputs = [recorder("sines", sines, x, x.detach()).sum() for _ in range(3)]
    outputs[2].backward()
    with pytest.raises(RuntimeError, match=r"^model.cuda_graphs: backward\(\) came after another"):
        outputs[1].backward()
