"""What a training step and a token of an answer cost the host and the memory at 7B: counted, without a clock."""

import pytest

# Counted of a step as it is by default, at the official batch; more is a regression.
LAUNCHES = {
    1: 4019,
    2: 3915,
}  # 4,177 at stage 1 before slices cost nothing and attention was called directly
FLOPS = {1: 109.8e12, 2: 56.6e12}  # of matrix products; attention's are none
GIB = {1: 23.6, 2: 20.8}  # at most
NODES = 450  # of a token's graph; 1,303 before it was compiled
BESIDE = 50  # launches that choose the next token


@pytest.fixture(scope="module")
def counted(on_counting_gpu):
    return on_counting_gpu("tests.counting_gpu.seven_billion")


@pytest.mark.parametrize("stage", [1, 2])
def test_a_training_step(counted, stage):
    found = counted[f"lean {stage}"]
    assert found["waits"] == 0
    assert found["copies"] == 1  # all indices; the images are on the device
    assert found["launches"] <= LAUNCHES[stage]
    assert found["flops"] == pytest.approx(FLOPS[stage], rel=0.01)
    assert found["GiB"] <= GIB[stage]


def test_a_token(counted):
    """Drawn without a seed: the graph is launched, then the next token is chosen, and waited for."""
    found = counted["answer"]
    assert found["recorded"] and len(found["nodes"]) == 1
    assert found["nodes"][0] <= NODES
    assert found["waits"] == 1 and found["copies"] == 0
    assert found["launches"] <= BESIDE


def test_a_thread_draws_while_another_records(counted):
    assert counted["errors of the other thread"] == []
