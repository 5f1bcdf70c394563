"""Packed rows have the loss and gradient of padded ones, for all LLM families that support them."""

import itertools

import pytest
import torch
import torch._inductor.config

from minigpt4.common.config import as_section
from minigpt4.common.cuda_graphs import Recorder
from minigpt4.models import MiniGPT4
from minigpt4.models.llm import attention, backends, counting, layouts, lean, row_logits
from minigpt4.text.rows import IGNORED, IMAGE_ID, Row, split_batch
from tests.golden.model import CONFIG, golden_model

# Relative, float32. Measured on the golden model: loss 1.4e-7, gradient 8.7e-7.
TOLERANCE = 5e-6
TURNS = [
    ("What is it?", "A bus."),
    ("Which colour has the bus in front of the house?", "Red, and it is old."),
]


def samples(texts, **more):
    generator = torch.Generator().manual_seed(3)
    size = CONFIG["image_size"]
    return {
        "image": torch.randn(len(texts), 3, size, size, generator=generator),
        "text_input": texts,
        **more,
    }


def loss_and_gradient(model, batch, path):
    model.llm_backend = path
    model.zero_grad()
    loss = model(batch | {"iters": 0})["loss"]
    loss.backward()
    return loss.item(), model.llama_proj.weight.grad.clone()


BATCHES = {
    "captions": samples(["a bus", "the old lighthouse keeper climbs the stairs", "", "red"]),
    "one caption": samples(["a bus stops in front of the school"]),
    "instructions": samples(
        ["a bus", "red"], instruction=["", "Which colour does the very old bus have?"]
    ),
    "turns": samples(["", "a bus", "red"], turns=[TURNS, (), TURNS[:1]]),
    "a row without targets": samples(["", "a bus"], end="</s>"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_loss_and_gradient_are_those_of_padded_texts(name, tmp_path):
    batch = dict(BATCHES[name])
    (tmp_path / "prompts.txt").write_text("<Img><ImageHere></Img> Describe this image in detail.")
    model = golden_model(
        tmp_path,
        prompt_path=str(tmp_path / "prompts.txt"),
        prompt_template="###Human: {} ###Assistant: ",
        end_sym=batch.pop("end", "###"),
        max_txt_len=60,
    ).train()
    assert model.choose_backend() == "lean"
    loss, gradient = loss_and_gradient(model, batch, "padded")
    # with a recorder, as on a GPU, positions and targets are rounded up
    for path, recorder in itertools.product(("packed", "lean"), (None, Recorder())):
        model.recorder = recorder
        found, found_gradient = loss_and_gradient(model, batch, path)
        assert found == pytest.approx(loss, rel=TOLERANCE)
        assert (found_gradient - gradient).norm() <= TOLERANCE * gradient.norm()


@pytest.mark.parametrize("name", BATCHES)
def test_losses_of_rows_are_those_of_each_sample_alone(name, tmp_path):
    """For each layout, whatever else is in the batch. Measured: 1.2e-7 relative."""
    batch = dict(BATCHES[name])
    settings = {
        "prompt_template": "###Human: {} ###Assistant: ",
        "end_sym": batch.pop("end", "###"),
    }
    model = golden_model(tmp_path, max_txt_len=60, **settings)
    model.choose_backend()
    texts = {key: value for key, value in batch.items() if key != "image"}
    alone = []
    for number, row in enumerate(model.rows(batch)):
        if row.num_targets:
            sample = {key: value[number : number + 1] for key, value in texts.items()}
            model.llm_backend = "padded"
            found = model(sample | {"image": batch["image"][number : number + 1]})
            assert found["num_targets"] == row.num_targets
            alone.append(found["loss"].item() * row.num_targets)
        else:
            alone.append(0.0)
    ways = [("padded", None), *itertools.product(("packed", "lean"), (None, Recorder()))]
    for path, model.recorder in ways:
        model.llm_backend = path
        found, mean = model(batch, reduction="none"), model(batch)
        assert found["loss"].tolist() == pytest.approx(alone, rel=TOLERANCE)
        assert found["num_targets"].tolist() == [row.num_targets for row in model.rows(batch)]
        assert (found["loss"].sum() / found["num_targets"].sum()).item() == pytest.approx(
            mean["loss"].item(), rel=TOLERANCE
        )
        _, gradient = loss_and_gradient(model, batch, path)
        model.zero_grad()
        model(batch, reduction="none")["loss"].sum().backward()
        summed = model.llama_proj.weight.grad / mean["num_targets"]
        assert (summed - gradient).norm() <= TOLERANCE * gradient.norm()
    with pytest.raises(ValueError, match=r"^reduction: 'sum'; expected 'mean' or 'none'$"):
        model(batch, reduction="sum")


def test_compiled_by_choice(tmp_path):
    try:
        torch.compile(torch.sin)(torch.zeros(2))
    except Exception as error:  # of many kinds; the message to users has a test of its own
        pytest.skip(
            f"torch.compile does not work here (Debian: apt-get install g++ python3-dev): {error}"
        )
    batch = BATCHES["captions"]
    model = golden_model(tmp_path, compile=True).train()
    assert model.choose_backend() == "compiled"  # with its logits compared to the LLM's own
    loss, gradient = loss_and_gradient(golden_model(tmp_path).train(), batch, "lean")
    found, found_gradient = loss_and_gradient(model, batch, "compiled")
    assert found == pytest.approx(loss, rel=TOLERANCE)
    assert (found_gradient - gradient).norm() <= TOLERANCE * gradient.norm()
    # a block of the ViT, and each kernel
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 1 + len(lean.EAGER)


def test_a_cpu_compiles_on_demand_alone():
    section = as_section({"llama_model": "any"}, MiniGPT4.Config, "model")
    MiniGPT4.settle_training(section, torch.device("cpu"), shard_llm=False)
    assert section.compile is None and section.cuda_graphs is False


def test_rounded_batches_have_few_shapes():
    """The shapes depend on the lengths only in steps of `layouts.POSITIONS`; the filler row is a row of its own."""
    shapes = set()
    for length in range(1, 60):
        rows = [row([1, 3, IMAGE_ID, IMAGE_ID, 2], [5] * length, [5] * length, image=0)] * 2
        packed = layouts.pack(rows, num_image_tokens=2)
        rounded = packed.rounded()
        assert rounded.ids[: len(packed.ids)] == packed.ids
        assert rounded.targets[: len(packed.targets)] == packed.targets
        assert sum(rounded.lengths) + rounded.num_shared == len(rounded.ids) > len(packed.ids)
        assert len(rounded.positions) == len(rounded.ids)
        assert len(rounded.predicting) == len(rounded.targets)
        assert set(rounded.predicting[len(packed.targets) :]) == {len(rounded.ids) - 1}
        shapes.add((len(rounded.ids), len(rounded.targets)))
    assert shapes == {(64, 512), (128, 512)}


def test_no_compiler_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    torch._dynamo.reset()  # discards what is already compiled
    with pytest.raises(
        ValueError, match=r"^model.compile: torch.compile does not work on cpu \(.*install a C\+\+"
    ):
        golden_model(tmp_path, compile=True)


def test_padding_by_choice(tmp_path):
    assert golden_model(tmp_path, pack_sequences=False).choose_backend() == "padded"


def row(prompt, ids, labels, image):
    return Row(
        prompt + ids, [IGNORED] * len(prompt) + labels, len(prompt), range(image, image + 1), 0
    )


def test_pack_by_hand():
    rows = [
        row([1, IMAGE_ID, IMAGE_ID], [4, 6], [4, 6], image=0),
        row([1, 3, IMAGE_ID, IMAGE_ID, 2], [5], [IGNORED], image=1),
        row([1, 3, IMAGE_ID, IMAGE_ID, 2], [7, 8, 9], [IGNORED, 8, IGNORED], image=2),
    ]
    packed = layouts.pack(rows, num_image_tokens=2)
    assert packed.rows == [2, 0]  # the longest first; the second has no target
    assert packed.num_shared == 1
    # the common beginning, then each row up to the position that predicts its last target (8 and 6)
    assert packed.ids == [1, 3, IMAGE_ID, IMAGE_ID, 2, 7, IMAGE_ID, IMAGE_ID, 4]
    assert packed.lengths == [5, 3]
    assert packed.positions == [0, 1, 2, 3, 4, 5, 1, 2, 3]
    assert packed.vectors == [4, 5, 0, 1]
    assert packed.predicting == [5, 7, 8]
    assert packed.targets == [8, 4, 6]


def test_segments_of_any_length_lie_in_one_grid():
    segments = attention.Segments([140, 130, 70, 68, 5], torch.device("cpu"), num_shared=2)
    for dtype in (torch.float32, torch.bfloat16):
        grid = segments.grid(6, 2, None, dtype)
        assert grid.view == (6, 2, 3, 140, 142)
        assert segments.grid(6, 2, None, dtype) is grid


@pytest.mark.parametrize("num_shared", [0, 2])
@pytest.mark.parametrize("window", [None, 3])
# [6, 6]: no padding
@pytest.mark.parametrize("lengths", [[5, 1, 8], [140, 130, 70, 68, 5], [6, 6]])
def test_attention_by_segments(lengths, window, num_shared):
    """Compared with attention over all positions with a dense mask; gradients of shared positions do not count."""
    generator = torch.Generator().manual_seed(1)
    total = num_shared + sum(lengths)
    q, k, v = (
        torch.randn(total, heads, 4, generator=generator, requires_grad=True) for heads in (6, 2, 2)
    )
    segments = attention.Segments(lengths, torch.device("cpu"), num_shared)
    segment = torch.repeat_interleave(
        torch.arange(-1, len(lengths)), torch.tensor([num_shared, *lengths])
    )
    position = torch.cat(
        [torch.arange(num_shared), *(torch.arange(num_shared, num_shared + n) for n in lengths)]
    )
    distance = position[:, None] - position
    seen = (segment[:, None] == segment) | (segment == -1)
    seen &= (distance >= 0) & (distance < (window or total))
    heads_first = [each.transpose(0, 1)[None] for each in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, attn_mask=seen, scale=0.3, enable_gqa=True
    )
    expected = expected[0].transpose(0, 1)
    found = attention.attend(q, k, v, segments, 0.3, window)
    weights = torch.randn(found.shape, generator=generator)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(out, (q, k, v), weights) for out in (found, expected)]
    torch.testing.assert_close(*([each[num_shared:] for each in of_all] for of_all in gradients))


def test_keys_of_the_fused_kernel():
    """The keys of a segment are contiguous, after the repeated shared ones, whose gradients are dropped."""
    with counting.as_on_gpu():
        segments = attention.Segments([2, 1], torch.device("cpu"), 2, others=[[7, 8], []])
    assert [each.tolist() for each in segments.sent] == [[7, 8], []]
    assert segments.keys.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4]
    assert segments.query_limits.tolist() == [0, 2, 4, 5]
    assert segments.key_limits.tolist() == [0, 2, 6, 9]
    keys = torch.arange(5.0, requires_grad=True)
    attention.RepeatShared.apply(keys, segments).backward(torch.arange(9.0))
    assert keys.grad.tolist() == [0, 1, 4, 5, 8]


def test_cross_entropy_piece_by_piece(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, 50, generator=generator, requires_grad=True)
    targets = torch.randint(50, (7,), generator=generator)
    monkeypatch.setattr(row_logits, "_rows_at_a_time", lambda logits: 3)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    losses = row_logits.TokenLosses.apply(logits, targets), expected
    torch.testing.assert_close(*losses)
    weights = torch.randn(7, generator=generator)
    torch.testing.assert_close(*(torch.autograd.grad(loss @ weights, logits) for loss in losses))


# families

SHAPE = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
FAMILIES = {  # configuration class -> (its arguments, the path it takes)
    "LlamaConfig": (SHAPE, "lean"),
    "MistralConfig": (SHAPE | {"sliding_window": None}, "lean"),
    "Qwen2Config": (SHAPE, "lean"),  # biases of queries, keys and values
    "Qwen3Config": (SHAPE | {"head_dim": 8}, "lean"),  # norms of queries and keys
    "MistralConfig, window": (SHAPE | {"sliding_window": 4}, "packed"),
    "OlmoeConfig": (SHAPE | {"num_experts": 4, "num_experts_per_tok": 2}, "packed"),
    "CohereConfig": (SHAPE, "packed"),  # attention beside the MLP, scaled logits
    "Gemma2Config": (SHAPE | {"head_dim": 8}, "padded"),  # caps its scores
    # their own attention
    "BloomConfig": ({"vocab_size": 60, "hidden_size": 16, "n_layer": 2, "n_head": 4}, "padded"),
    "MambaConfig": (
        {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        "padded",
    ),
}


def family(name):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, name.split(",")[0])(**FAMILIES[name][0])
    llm = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in llm.named_parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(10)  # large weights, so that attention affects the logits
        elif name.endswith("bias"):
            parameter.data.normal_()
    return llm.requires_grad_(False)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_take_the_path_that_keeps_their_logits(name):
    llm, path = family(name), FAMILIES[name][1]
    assert backends.choose(llm) == path
    usual = llm.config._attn_implementation
    lengths, start = [9, 4, 6], torch.randn(3, 16)  # all texts begin with `start`
    embeds = torch.randn(sum(lengths), 16, requires_grad=True)
    positions = torch.cat([torch.arange(3), *(torch.arange(3, 3 + length) for length in lengths)])
    predicting = torch.tensor([3, 8, 10, 18])
    texts = [torch.cat([start, row])[None] for row in embeds.split(lengths)]
    alone = torch.cat([llm(inputs_embeds=text, use_cache=False).logits[0, 3:] for text in texts])
    weights = torch.randn(4, 60)
    expected = torch.autograd.grad(alone[predicting], embeds, weights)[0]
    for way in [] if path == "padded" else ["packed", path]:
        segments = attention.Segments(lengths, embeds.device, num_shared=3)
        logits = backends.PACKED[way](
            llm, torch.cat([start, embeds]), positions, segments, 3 + predicting
        )
        torch.testing.assert_close(logits, alone[predicting], rtol=1e-4, atol=1e-4)
        found = torch.autograd.grad(logits, embeds, weights)[0]
        assert (found - expected).norm() <= 1e-4 * expected.norm()  # measured: 2.5e-7 and less
    assert llm.config._attn_implementation == usual


def test_another_layer_does_not_pass_for_llama(caplog):
    """A layer with the right submodules but another computation is detected by its logits."""
    llm = family("LlamaConfig")
    llm.model.layers[0].register_forward_hook(lambda layer, inputs, output: 2 * output)
    assert lean.fits(llm)
    with caplog.at_level("INFO"):
        assert backends.choose(llm) == "packed"


# a batch in parts


@pytest.mark.parametrize("name", ["captions", "turns"])
def test_parts_of_a_batch_add_up_to_it(name, tmp_path):
    options = {
        "prompt_template": "###Human: {} ###Assistant: ",
        "end_sym": "###",
        "max_txt_len": 60,
    }
    model, batch = golden_model(tmp_path, **options).train(), BATCHES[name] | {"iters": 0}
    loss, gradient = loss_and_gradient(model, batch, "lean")
    lengths = [len(row.ids) for row in model.rows(batch)]
    model.zero_grad()
    parts = model.split(batch, lengths[0] + lengths[1])
    assert (
        len(parts) > 1
        and [text for part, _ in parts for text in part["text_input"]] == batch["text_input"]
    )
    total = 0
    for part, share in parts:
        (share * (found := model(part)["loss"])).backward()
        total += share * found.item()
    assert total == pytest.approx(loss, rel=TOLERANCE)
    assert (model.llama_proj.weight.grad - gradient).norm() <= TOLERANCE * gradient.norm()


def test_split_by_hand():
    """Parts of at most 8 tokens: a longer sample is a part of its own. Of 4: a sample without a target is left out."""
    has, has_none = [7, 8], [IGNORED, IGNORED]
    prompt = [1, IMAGE_ID]
    rows = [
        row(prompt, [7, 8], labels, number)
        for number, labels in enumerate((has, has, has_none, has))
    ]
    rows.append(row(prompt, [7] * 9, [7] * 9, 4))
    batch = {"text_input": list("abcde"), "image": torch.arange(5), "iters": 3}
    parts = split_batch(batch, rows, max_tokens=8)
    assert [(part["text_input"], part["image"].tolist(), part["iters"]) for part, _ in parts] == [
        (["a", "b"], [0, 1], 3),
        (["c", "d"], [2, 3], 3),
        (["e"], [4], 3),
    ]
    assert [share for _, share in parts] == [4 / 15, 2 / 15, 9 / 15]
    alone = split_batch(batch, rows, max_tokens=4)
    assert [part["text_input"] for part, _ in alone] == [["a"], ["b"], ["d"], ["e"]]
    assert split_batch(batch, [rows[2]] * 5, max_tokens=4) == [(batch, 1)]
