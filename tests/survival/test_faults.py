"""What a run does about faults: the quickest with a toy LLM, all with the real one (`-m survival`); one bad rank."""

from dataclasses import replace

import pytest
import torch

from tests.survival.fault_rows import FAULTS, S3
from tests.survival.matrix import BEGIN, END, Matrix, counted, table, write_section
from tests.survival.s3_server import MISSING, REASON, s3_server
from tests.survival.web_server import web_server
from tests.training import batches, by_hand, found_by_two_ranks

QUICK = (
    "a misspelt key",
    "one of three missing",
    "cut within an image",
    "a pickle beside it (.pth)",
)


@pytest.fixture
def matrix(cache, tmp_path):
    with web_server(tmp_path) as address:
        yield Matrix(tmp_path, address, 240, cache)


def named(name):
    (fault,) = [fault for fault in FAULTS if fault.name == name]
    return fault


@pytest.mark.parametrize("name", QUICK)
def test_a_quick_fault_is_as_declared(matrix, name):
    outcome = matrix.outcome(named(name))
    assert not outcome["wrong"] and outcome["message"] and str(matrix.folder) not in str(outcome)


@pytest.fixture(scope="module")
def s3():
    with s3_server():
        yield


@pytest.mark.skipif(bool(MISSING), reason=REASON)
@pytest.mark.parametrize(
    "fault", [fault for fault in FAULTS if fault.group == S3], ids=lambda fault: fault.name
)
def test_a_fault_of_an_object_store_is_as_declared(s3, matrix, fault):
    outcome = matrix.outcome(fault)
    assert not outcome["wrong"] and outcome["message"]


def marked(fault):
    return pytest.param(
        fault, marks=pytest.mark.skipif(fault.group == S3 and bool(MISSING), reason=REASON)
    )


@pytest.mark.survival
@pytest.mark.parametrize(
    "fault", list(map(marked, FAULTS)), ids=lambda fault: f"{fault.group}: {fault.name}"
)
def test_a_fault_is_as_declared(outcomes, fault):
    outcome = outcomes[fault.group, fault.name].result()
    assert not outcome["wrong"]


def test_a_fault_that_differs_fails(matrix):
    fault = replace(named("a misspelt key"), code=0, says="all is well", lost={"bad_image": 1})
    wrong = matrix.outcome(fault)["wrong"]
    assert [each.split(",")[0].split(" ")[0] for each in wrong] == ["exit", "does", "lost"]


def test_the_matrix_covers_what_was_promised(tmp_path):
    assert len(FAULTS) >= 40 and len({(fault.group, fault.name) for fault in FAULTS}) == len(FAULTS)
    assert counted("laion: 3 of 9 samples skipped (2 bad_image, 1 no_image)\n") == {
        "bad_image": 2,
        "no_image": 1,
    }
    assert counted("laion: 0 of 9 samples skipped\n") == {} and counted("nothing") is None
    document = tmp_path / "a.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    row = {
        "group": "G",
        "name": "n",
        "exit": 0,
        "message": "a | b",
        "lost": {"bad_image": 1},
        "seconds": 1.2,
    }
    write_section(document, [row])
    assert document.read_text() == f"before\n{BEGIN}\n{table([row])}\n{END}\nafter\n"
    assert "| n | continues to its end | `a \\| b` | 1 bad_image | 1 |" in document.read_text()
    document.write_text("no marks")
    with pytest.raises(ValueError, match="has no <!-- faults"):
        write_section(document, [row])


ONE_BAD_RANK = """
import json, os, sys
import torch
from minigpt4.runners import RunnerBase
from tests.training import batches, endless, runner, settings, tiny_model

root, rank = sys.argv[1], int(os.environ["RANK"])
cfg = settings(root, max_epoch=1, iters_per_epoch=6, warmup_lr=0.05, min_lr=0.05)
cfg.pretty_print = lambda: None
calls = []

def steep(module, args, result):  # the value is as it was; its gradient, 1 / (2 sqrt 0), is infinite
    calls.append(1)
    return result + (result * 0).abs().sqrt() if rank == 0 and len(calls) == 4 else result

with RunnerBase.launched(cfg):
    halves = [{"image": b["image"].chunk(2)[rank], "text_input": ["a"] * 2} for b in batches(number=6)]
    if rank == 1:
        halves[1]["image"] = halves[1]["image"] * float("nan")
    model = tiny_model()
    model.llama_proj.register_forward_hook(steep)
    run = runner(cfg, model)
    run.train(endless(halves))
    weights = torch.cat([parameter.detach().flatten() for parameter in model.llama_proj.parameters()])
    json.dump(weights.tolist(), open(f"{root}/found_{rank}.json", "w"))
"""


def test_a_number_that_is_not_finite_on_one_rank_costs_one_update_on_both(tmp_path):
    first, second, said = found_by_two_ranks(ONE_BAD_RANK, tmp_path)
    assert first == second
    a, _, c, _, e, f = batches(number=6)
    expected = by_hand([(1, [each]) for each in (a, c, e, f)], lr=0.05)
    assert (torch.tensor(first) - expected).abs().max() < 1e-6  # as in test_two_ranks_train_as_one
    assert "step 1: loss is nan on rank 1" in said
    for step, so_far in ((1, 1), (3, 2)):
        assert (
            said.count(f"step {step}: update skipped on all ranks, 1 in a row, {so_far} so far")
            == 1
        )
