"""`benchmarks gpu` runs whole where nothing is computed: every step of every part, at small sizes."""

import pytest

STEPS = {"train": 11, "answers": 5, "products": 9}


@pytest.mark.slow
@pytest.mark.parametrize("part", STEPS)
def test_every_step_runs(on_counting_gpu, part):
    words = ("--part", part, "--rehearsal", "--seconds", 1700, "--json", "-")
    found = on_counting_gpu("benchmarks", "gpu", *words, timeout=1800)
    assert len(found["steps"]) == STEPS[part]
    failed = {name for name, step in found["steps"].items() if step.keys() & {"error", "left out"}}
    assert not failed and found["passed"] and found["rows"]
