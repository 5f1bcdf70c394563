"""Recordings where nothing is computed: what is captured, and what a failure leaves."""

import pytest


@pytest.fixture(scope="module")
def found(on_counting_gpu):
    return on_counting_gpu("tests.counting_gpu.recording", gpus=2)


def test_forward_and_backward_are_captured_whole(found):
    """Though autograd runs backward in a thread of its own: nothing is launched on another stream."""
    assert found["forward and backward"] == {"nodes": [3, 2], "beside": 0, "calls": 2}


def test_a_gpu_that_is_not_the_current_one(found):
    assert found["another GPU"] == {"nodes": [2], "beside": 0, "current": 0}


@pytest.mark.parametrize("failure", ["an illegal call", "an exception"])
def test_a_failure_ends_recording_and_nothing_else(found, failure):
    after = found[failure]
    (warning,) = after.pop("warnings")
    assert warning.startswith("model.cuda_graphs: steps are not recorded: ")
    assert after == {
        "off": True,
        "same stream": True,
        "captures": False,
        "gradient": True,
        "cache is emptied": True,
    }
    assert found["afterwards"] == found["forward and backward"]


def test_backward_is_captured_without_autocast(found):
    """As a training calls it: of 4 calls one is a step, two warm up, one is captured."""
    assert found["autocast"] == {"calls": 4, "on": False, "recorded": 2}


def test_a_recording_adds_its_tensors_alone(found):
    """No workspace of cuBLAS, of 31 MB on this GPU: all are captured on one stream."""
    first, last = found["memory"]
    assert last - first < 1e6


def test_a_second_backward_is_refused(found):
    assert found["backward twice"].startswith("model.cuda_graphs: backward() came a second time")


def test_what_loading_took_counts_for_no_step(found):
    assert found["after loading"] == 2


def test_recordings_that_fill_the_gpu_are_given_up(found):
    """The steps go on without them; what they held is free."""
    after = found["growing"]
    (warning,) = after["warnings"]
    assert warning.startswith("model.cuda_graphs: steps are not recorded: ")
    assert after["calls"] > 1 and after["GiB held"] < 20
