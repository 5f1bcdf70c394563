"""An LLM sharded across two ranks computes what the whole LLM does, also if the ranks' batches are unequal."""

import multiprocessing
from functools import partial

import pytest
import torch

from minigpt4.common.dist_utils import average_gradients, sum_over_ranks
from minigpt4.models import MiniGPT4
from minigpt4.models.llm import sharding
from tests.golden.model import CONFIG, golden_config
from tests.runners.conftest import be_a_rank

WAYS = {
    "none": ("padded", "packed", "lean", "lean, recomputed", "packed, recomputed"),
    "int8": ("packed", "lean", "lean, recomputed"),
}
DIVIDED = [kind for kind in sharding.KINDS if sharding.refusal(kind) is None]
PIXELS = torch.randn(
    2, 3, CONFIG["image_size"], CONFIG["image_size"], generator=torch.Generator().manual_seed(3)
)
# the batch of each rank: the second has only text
BATCHES = (
    {
        "image": PIXELS,
        "text_input": ["a bus", "the old lighthouse keeper climbs the stairs"],
        "iters": 0,
    },
    {
        "image": PIXELS[:0],
        "num_images": [0, 0],
        "text_input": ["red", "a very long walk along the river"],
        "iters": 0,
    },
)


def built(folder, kind, **options):
    folder.mkdir(exist_ok=True)
    return MiniGPT4.from_config(
        golden_config(folder, llm_quantization=kind), device="cpu", **options
    ).train()


def step(model, batches, way):
    """Return (mean loss, gradient of the projection, number of targets) of all targets of some batches."""
    model.llm_backend, _, recomputed = way.partition(", ")
    model.llm_checkpointing = bool(recomputed)
    model.zero_grad()
    found = [model(batch) for batch in batches]
    total = sum(each["num_targets"] for each in found)
    loss = sum(each["loss"] * (each["num_targets"] / total) for each in found)
    loss.backward()
    return loss.item(), model.llama_proj.weight.grad, total


def step_of_two_ranks(model, rank, way):
    loss, _, count = step(model, BATCHES[rank : rank + 1], way)
    average_gradients([model.llama_proj.weight], weight=count)
    total, count = sum_over_ranks([loss * count, count], model.device)
    return total / count, model.llama_proj.weight.grad


def whole_parameters(llm):
    return [
        name for name, parameter in llm.named_parameters() if not hasattr(parameter, "to_local")
    ]


def unequal_passes(model, rank, way):
    """Return the losses of the passes of this rank: rank 0 makes two, rank 1 makes none and only lends its shards."""
    model.llm_backend = way
    with model.in_turns(), torch.no_grad():
        return [model(BATCHES[0], reduction="none")["loss"] for _ in range(2 - 2 * rank)]


def compare(folder, rank):
    """Write to `folder` the results of this rank with the whole LLM and with its shard."""
    found = {}
    for kind in DIVIDED:
        whole = built(folder / f"{kind} {rank}", kind)
        shared = built(folder / f"{kind} {rank}", kind, shard_llm=True)
        for way in WAYS[kind]:
            expected, mine = step(whole, BATCHES, way), step_of_two_ranks(shared, rank, way)
            found[kind, way] = expected[:2], mine, whole_parameters(shared.llama_model)
        local = sum(parameter.to_local().nbytes for parameter in shared.llama_model.parameters())
        buffers = sum(buffer.nbytes for buffer in shared.llama_model.buffers())
        found[kind, "bytes"] = (
            sum(parameter.nbytes for parameter in whole.llama_model.parameters()),
            local,
            buffers,
        )
        found[kind, "chosen"] = whole_choice(whole), whole_choice(shared)
        whole.llm_backend = "lean"
        expected = whole(BATCHES[0], reduction="none")["loss"].detach()
        found[kind, "unequal"] = (
            expected,
            unequal_passes(shared, rank, "lean"),
            whole_parameters(shared.llama_model),
        )
    torch.save(found, folder / f"{rank}.pt")


def whole_choice(model):
    model.llm_backend = None
    return model.choose_backend()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results of each rank, as written by `compare`."""
    folder, fork = tmp_path_factory.mktemp("ranks"), multiprocessing.get_context("fork")
    work = partial(compare, folder)
    ranks = [
        fork.Process(target=be_a_rank, args=(rank, folder, work), daemon=True) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for number, process in enumerate(ranks):
        process.join(900)
        assert process.exitcode == 0, (folder / f"{number}.txt").read_text()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", DIVIDED)
def test_two_ranks_are_one(found, kind):
    """In float32; measured: 0 for each rank, 1e-7 for their mean."""
    for of_rank in found:
        for way in WAYS[kind]:
            (loss, gradient), (mine, my_gradient), left_whole = of_rank[kind, way]
            assert mine == pytest.approx(loss, rel=1e-6), way
            assert (
                my_gradient - gradient
            ).norm() <= 1e-6 * gradient.norm() and gradient.norm() > 0, way
            assert not left_whole, way
        assert of_rank[kind, "chosen"] == ("lean", "lean")


@pytest.mark.parametrize("kind", DIVIDED)
def test_a_rank_holds_half(found, kind, tmp_path):
    planned = built(tmp_path, kind).llama_model
    for of_rank in found:
        whole, mine, buffers = of_rank[kind, "bytes"]
        assert mine == whole / 2
        assert mine + buffers == sharding.share_bytes(planned, 2)


@pytest.mark.parametrize("kind", DIVIDED)
def test_ranks_that_have_less_to_do_lend_their_shares(found, kind):
    expected, losses, left_whole = found[0][kind, "unequal"]
    assert len(losses) == 2 and all(torch.equal(each, expected) for each in losses)
    assert not left_whole and found[1][kind, "unequal"][1:] == ([], [])


def test_a_spread_llm_answers_the_same(tmp_path):
    """As with `model.device_map`: layers on different devices, here in memory and on disk, moved by accelerate's hooks.

    Relative noise of weights at another memory address: 1.7e-7.
    """
    from accelerate import dispatch_model

    model = MiniGPT4.from_config(golden_config(tmp_path, device_map="auto"), device="cpu")
    expected = answer_logits(model)
    llm, device_map = model.llama_model, {"model.layers.1": "disk", "lm_head": "disk"}
    device_map |= dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"), "cpu"
    )
    model.llama_model = dispatch_model(
        llm, device_map, main_device="cpu", offload_dir=tmp_path / "offload", force_hooks=True
    )
    assert llm.model.layers[1].mlp.up_proj.weight.is_meta and not model.decoder().static
    assert (answer_logits(model) - expected).norm() <= 2e-6 * expected.norm()


@torch.no_grad()
def answer_logits(model):
    """Return the logits after a text, and after one more token."""
    decoder = model.decoder()
    past = decoder.new_past()
    embeds = model.llama_model.get_input_embeddings()(torch.tensor([[1, 5, 9, 13]]))
    logits = [decoder.prefill(past, embeds, torch.arange(4)[None], None)]
    with decoder.steps(past, 1, 8) as next_logits:
        logits.append(next_logits(torch.tensor([7]), torch.tensor([[4]]), None))
    return torch.stack(logits)


def test_a_tied_output_layer_becomes_a_copy(tmp_path):
    llm = built(tmp_path, "none").llama_model
    llm.set_output_embeddings(
        torch.nn.Linear(*reversed(llm.get_input_embeddings().weight.shape), bias=False)
    )
    llm.get_output_embeddings().weight = llm.get_input_embeddings().weight
    tied, shares = sharding.share_bytes(llm, 1), sharding.share_bytes(llm, 2)
    sharding.untie(llm)
    assert torch.equal(llm.get_output_embeddings().weight, llm.get_input_embeddings().weight)
    assert sharding.share_bytes(llm, 1) == tied + llm.get_input_embeddings().weight.nbytes
    assert sharding.share_bytes(llm, 2) == shares


def test_the_plan_counts_a_share_and_what_is_gathered(tmp_path):
    cfg = golden_config(tmp_path)
    whole, half = (MiniGPT4.training_memory(cfg, "cuda", 2, num_shares=shares) for shares in (1, 2))
    parts = {
        shares: {part.name: part for part in MiniGPT4.plan(cfg, "cpu", shares)} for shares in (1, 2)
    }
    llm = built(tmp_path, "none").llama_model
    largest = max(
        sum(weight.nbytes for weight in part.parameters()) for part in sharding.parts(llm)[:-1]
    )
    assert half - whole == pytest.approx(
        3 * largest - sharding.share_bytes(llm, 1) + sharding.share_bytes(llm, 2)
    )
    assert (
        parts[1]["llama_model"].bytes - parts[2]["llama_model"].bytes
        > 0.49 * parts[1]["llama_model"].bytes
    )
    assert parts[1]["llama_proj"] == parts[2]["llama_proj"]


def test_what_this_torch_cannot_divide_is_refused(monkeypatch):
    assert sharding.refusal("nf4").endswith(
        "nf4 cannot be divided among ranks; take one of none, int8"
    )
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0+cu130"))
    refusal = (
        "model.llm_quantization int8 cannot be divided among ranks by torch 2.11.0+cu130, whose"
    )
    assert sharding.refusal("int8").startswith(refusal)
    assert sharding.refusal("none") is None
