"""Recorded training steps, by graphs that are emulated: other batches of the same shapes get their own gradient."""

import pytest
import torch

from minigpt4.common.cuda_graphs import Recorder
from minigpt4.models.llm import attention, counting
from tests.common.emulated_graphs import emulated
from tests.golden.model import golden_model
from tests.models.test_packing import loss_and_gradient, samples

TOLERANCE = 5e-6
# of as many tokens together, divided otherwise; the golden LLM's tokens are characters
CAPTIONS = [
    ["a bus stops", "red", "an old tree"],
    ["a bus", "red houses", "a tall tree"],
    ["two dogs", "a cat", "a small house"],
    ["dogs", "a small cat", "a house...."],
]


def segment_of(limits, number):
    return torch.searchsorted(limits[1:], torch.arange(number), right=True)


def shares(q, k, query_limits, key_limits, scale):
    """Return attention's weights [H, T, T'], each query's own, causal from the end."""
    query_segment, key_segment = segment_of(query_limits, len(q)), segment_of(key_limits, len(k))
    from_end = query_limits[query_segment + 1] - torch.arange(len(q))
    key_from_end = key_limits[key_segment + 1] - torch.arange(len(k))
    seen = (query_segment[:, None] == key_segment) & (key_from_end >= from_end[:, None])
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def flash_forward(q, k, v, query_limits, key_limits, *limits, scale, **options):
    weights = shares(q, k, query_limits, key_limits, scale)
    return torch.einsum("hqk,khd->qhd", weights, v), *torch.zeros(4)


def flash_backward(grad, q, k, v, out, kept, query_limits, key_limits, *limits, scale, **options):
    weights = shares(q, k, query_limits, key_limits, scale)
    grad_weights = torch.einsum("qhd,khd->hqk", grad, v)
    inner = (grad * out).sum(-1).T[..., None]
    grad_scores = weights * (grad_weights - inner) * scale
    grad_q = torch.einsum("hqk,khd->qhd", grad_scores, k)
    grad_k = torch.einsum("hqk,qhd->khd", grad_scores, q)
    return grad_q, grad_k, torch.einsum("hqk,qhd->khd", weights, grad)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The golden model, which attends by limits that lie on the device, as on a GPU."""
    monkeypatch.setattr(attention, "has_flash", lambda device, dtype: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_forward, raising=False)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", flash_backward, raising=False)
    (tmp_path / "prompts.txt").write_text("<Img><ImageHere></Img> Describe this image in detail.")
    return golden_model(
        tmp_path,
        prompt_path=str(tmp_path / "prompts.txt"),
        prompt_template="###Human: {} ###Assistant: ",
        end_sym="###",
        max_txt_len=60,
    ).train()


def test_a_replay_reads_nothing_of_the_recorded_batch(model, monkeypatch):
    batches = [samples(texts) for texts in CAPTIONS]
    for number, batch in enumerate(batches):
        batch["image"] = batch["image"] + number
    with counting.as_on_gpu(), emulated(monkeypatch):
        expected = [loss_and_gradient(model, batch, "lean") for batch in batches]
        model.recorder = Recorder()
        found = [loss_and_gradient(model, batch, "lean") for batch in batches]
    names = [key[0] for key in model.recorder._recordings]
    assert len(names) == 2 and not model.recorder.is_off  # the vision side's and the LLM's
    assert model.recorder.calls == 2 * (len(batches) - 1)
    for (loss, gradient), (loss_found, gradient_found) in zip(expected, found, strict=True):
        assert loss_found == pytest.approx(loss, rel=TOLERANCE)
        assert (gradient_found - gradient).norm() <= TOLERANCE * gradient.norm()
