"""LoRA: every backend has the gradients of transformers, all versions' names are read, merging keeps the answers."""

import gc
import logging
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt4.conversation.sample_answers import answer_samples
from minigpt4.models import MiniGPTv2, memory
from minigpt4.models.llm import adapters
from minigpt4.text.rows import IMAGE_ID
from tests.golden_v2.model import CONFIGS, V2, checkpoint_of, folder_of, golden_config, golden_model
from tests.training import found_by_two_ranks

ATOL = 1e-5  # float32; gradients are up to 3, measured differences up to 3e-6


def batch(model, number=3, seed=0):
    """Return a mixed batch: an image, two images, text alone, several turns."""
    generator = torch.Generator().manual_seed(seed)
    size = model.image_size
    return {
        "image": torch.randn(4, 3, size, size, generator=generator),
        "num_images": [1, 2, 0, 1],
        "instruction_input": [
            "<Img><ImageHere></Img> [vqa] what is on the table ? ",
            "<Img><ImageHere></Img> and <Img><ImageHere></Img> what is different ? ",
            "List two animals.",
            (),
        ],
        "answer": ["a cup and two books", "the second one is brighter", "a cat and a dog", ()],
        "conv_q": [(), (), (), "<Img><ImageHere></Img> what do you see ? !@#and where ? "],
        "conv_a": [(), (), (), "a boat!@#on the lake"],
        "connect_sym": [(), (), (), "!@#"],
    }


@pytest.fixture
def model(tmp_path):
    return golden_model(V2, tmp_path, chat_template=True, end_sym="</s>")


@pytest.fixture
def shapes():
    """The trained tensors: {release name: shape}."""
    return CONFIGS[folder_of(V2)]["trainable"]


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_loss(model, samples):
    """Return the loss of a padded batch, computed by the model of transformers."""
    inputs, _ = model.build_inputs(samples)
    return model.llama_model(**inputs).loss


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("backend", ["packed", "padded"])
def test_gradients_are_those_of_transformers(model, shapes, backend, checkpointing, caplog):
    samples = batch(model)
    expected = gradients(model, plain_loss(model, samples))
    assert {model.release_name(name) for name in expected} == set(shapes)
    caplog.set_level(logging.INFO)
    assert model.choose_backend() == "packed"  # lean layers give no gradient to the LLM's weights
    assert [line for line in caplog.messages if line.startswith("LLM: ")] == [
        "LLM: texts are packed"
    ]
    model.llm_backend, model.llm_checkpointing = backend, checkpointing
    found = gradients(model, model(samples)["loss"])
    assert found.keys() == expected.keys()
    errors = {name: (found[name] - expected[name]).abs().max().item() for name in found}
    print(f"largest difference of a gradient, {backend}: {max(errors.values()):.1e}")
    assert max(errors.values()) <= ATOL


def test_gradients_with_weights_in_8_bits(tmp_path):
    """Packed and plain gradients agree for the same weights; the change by 8 bits is printed, and is a few percent."""
    texts = {"chat_template": True, "end_sym": "</s>"}
    whole = golden_model(V2, tmp_path, **texts)
    (tmp_path / "int8").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft says that it does not know our layers
        small = golden_model(V2, tmp_path / "int8", **texts, llm_quantization="int8")
    assert {type(part).__name__ for part in small.llama_model.modules()} >= {"Int8Linear", "Linear"}
    samples = batch(whole)
    expected = gradients(small, plain_loss(small, samples))
    found = gradients(small, small(samples)["loss"])
    assert max((found[name] - expected[name]).abs().max().item() for name in found) <= ATOL
    exact = gradients(whole, whole(samples)["loss"])
    exact, found = (
        torch.cat([each[name].flatten() for name in sorted(exact)]) for each in (exact, found)
    )
    error = ((found - exact).norm() / exact.norm()).item()
    print(f"int8 moves the gradient by {error:.1%}")
    assert error < 0.1


def test_a_batch_in_parts_and_reordered_has_the_same_loss(model):
    """Samples with one image, several, none, or several turns do not influence each other's losses."""
    samples = batch(model)
    losses = model(samples, reduction="none")
    for part, _ in model.split(samples, max_tokens=1):
        alone = model(part, reduction="none")
        place = losses["num_targets"].tolist().index(alone["num_targets"].item())
        assert alone["loss"].item() == pytest.approx(losses["loss"][place].item(), abs=1e-4)
    total = sum(
        share * model(part)["loss"].item() for part, share in model.split(samples, max_tokens=60)
    )
    assert total == pytest.approx(model(samples)["loss"].item(), abs=1e-5)


def test_updates_drop_inputs_in_training_alone(model, shapes):
    samples = batch(model)
    model.train()
    assert not model.llama_model.training and not model.visual_encoder.training
    torch.manual_seed(0)
    first, second = model(samples)["loss"].item(), model(samples)["loss"].item()
    # dropout is off while the backend is chosen
    assert first != second and model.llm_backend == "packed"
    model.eval()
    assert model(samples)["loss"].item() == model(samples)["loss"].item()
    dropped = [part.p for part in model.llama_model.modules() if isinstance(part, torch.nn.Dropout)]
    # Source: the newest release
    assert dropped == [0.05] * sum(".lora_A." in name for name in shapes)


def test_a_new_update_changes_nothing(tmp_path):
    """B is zero, so the LLM's answers do not change; only the updates and the projection train."""
    model = golden_model(V2, tmp_path, ckpt="")
    (tmp_path / "plain").mkdir()
    plain = golden_model(V2, tmp_path / "plain", ckpt="", lora_r=0)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            model.llama_model(ids).logits, plain.llama_model(ids).logits, rtol=0, atol=0
        )
    assert all(
        name.startswith("llama_proj") or ".lora_" in name for name in model.trainable_state_dict()
    )
    assert list(plain.trainable_state_dict()) == ["llama_proj.weight", "llama_proj.bias"]


def test_merged_and_unmerged_answer_alike(model):
    size = model.image_size
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    texts = ["<s>[INST] <Img><ImageHere></Img> [vqa] what is it ? [/INST]"]
    answers, ids = model.generate(image, texts), torch.arange(1, 30)[None]
    with torch.no_grad():
        logits = model.llama_model(ids).logits
        adapters.merge(model.llama_model)
        merged = model.llama_model(ids).logits
    print(f"merging moves logits by {(merged - logits).abs().max():.1e}")
    torch.testing.assert_close(merged, logits, rtol=0, atol=1e-4)  # of values up to 12
    assert model.generate(image, texts) == answers
    adapters.unmerge(model.llama_model)
    with torch.no_grad():
        torch.testing.assert_close(model.llama_model(ids).logits, logits, rtol=0, atol=1e-4)


def test_weights_in_8_bits_take_no_update_in(tmp_path):
    model = golden_model(V2, tmp_path, llm_quantization="int8")
    with pytest.raises(
        ValueError,
        match=r"^weights in 8 or 4 bits cannot take LoRA in; load the LLM with model.llm_q",
    ):
        adapters.merge(model.llama_model)


# names


def newer(name):
    """Return what peft since 0.3 calls a tensor of LoRA."""
    return name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")


@pytest.mark.parametrize("rename", [str, newer], ids=["peft 0.2", "peft 0.3 and later"])
def test_all_names_of_peft_are_read(tmp_path, rename):
    released = load_file(checkpoint_of(V2))
    state = {rename(name): tensor for name, tensor in released.items()}
    layer = "llama_model.base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq"
    state[layer] = torch.ones(8)  # a constant that the release saves
    save_file(state, tmp_path / "v2.safetensors")
    model = golden_model(V2, tmp_path, ckpt=str(tmp_path / "v2.safetensors"))
    saved = model.trainable_state_dict()
    assert saved.keys() == released.keys()
    assert all(torch.equal(saved[name], released[name]) for name in saved)


def test_a_checkpoint_without_lora_begins_anew_and_says_so(tmp_path, caplog):
    state = {
        name: tensor
        for name, tensor in load_file(checkpoint_of(V2)).items()
        if ".lora_" not in name
    }
    save_file(state, tmp_path / "projection.safetensors")
    golden_model(V2, tmp_path, ckpt=str(tmp_path / "projection.safetensors"))
    assert "has no LoRA; the model's starts anew, from the LLM as it is" in caplog.text


def test_an_llm_without_such_layers(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    llm = GPTNeoXForCausalLM(
        GPTNeoXConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    )
    message = r"^model.lora_r: 4, and GPTNeoXForCausalLM has no layers q_proj and v_proj for LoRA; take an LLM of LLaMA's"
    with pytest.raises(ValueError, match=message):
        adapters.add_lora(llm, 4, 6)


def test_the_plan_counts_what_trains(tmp_path, shapes):
    """On the meta device, before weights are loaded: the numbers of trainable parameters of each part."""
    parts = {part.name: part for part in MiniGPTv2.plan(golden_config(V2, tmp_path), "cpu")}
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    assert parts["llama_model"].trainable == sum(
        size for name, size in sizes.items() if ".lora_" in name
    )
    assert parts["llama_proj"].trainable == sizes["llama_proj.weight"] + sizes["llama_proj.bias"]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_step_keeps_what_is_counted(tmp_path, checkpointing):
    """In a step with values: what autograd saves, the optimizer's moments and the images agree with the count."""
    settings = {"max_txt_len": 40, "chat_template": False, "llm_checkpointing": checkpointing}
    counted = memory.count(
        MiniGPTv2, golden_config(V2, tmp_path, **settings), torch.device("cpu"), 3
    )
    model = golden_model(V2, tmp_path, **settings).train()
    model.llama_tokenizer = memory.tokenizer_of_characters()
    model.choose_backend()
    before, saved = alive(), {}
    samples = {
        "image": torch.randn(3, 3, model.image_size, model.image_size),
        "text_input": ["a" * 40] * 3,
    }
    with torch.autograd.graph.saved_tensors_hooks(
        lambda each: saved.update(storage_of(each)) or each, lambda each: each
    ):
        loss = model(samples)["loss"]
    # what autograd saved, what else Python holds, and the optimizer's state: two moments and a step count
    found = saved | alive()
    sizes = [storage.nbytes() for place, storage in found.items() if place not in before]
    for parameter in filter(lambda each: each.requires_grad, model.parameters()):
        sizes += [parameter.nbytes, parameter.nbytes, 4]
    measured = sum(-(-size // memory.ROUNDING) * memory.ROUNDING for size in sizes)
    print(
        f"kept for backward, beside weights: {measured:,} bytes, counted {counted.held - counted.weights:,}"
    )
    assert measured == pytest.approx(counted.held - counted.weights, rel=0.02)
    assert loss.requires_grad


def storage_of(tensor):
    """Return {address: storage} of a tensor."""
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage()}


def alive():
    """Return {address: storage} of all tensors that Python holds."""
    found = {}
    for each in gc.get_objects():
        if (
            issubclass(type(each), torch.Tensor)
            and each.device.type == "cpu"
            and each.layout is torch.strided
        ):
            found |= storage_of(each)
    return found


@pytest.mark.parametrize("within", [0, 2, 4])
def test_samples_whose_prompt_is_cut_before_within_or_behind_an_image_are_answered(model, within):
    samples = batch(model)
    model.max_context_len = (
        model.rows(samples)[0].ids.index(IMAGE_ID) - len(model.encoder.bos) + within
    )
    assert model.rows(samples)[0].ids[: model.rows(samples)[0].num_prompt].count(IMAGE_ID) == within
    answers = answer_samples(model, samples, 3)
    assert [prompt.count("[image]") for prompt, _ in answers] == [
        bool(within),
        bool(within),
        0,
        bool(within),
    ]


TWO_RANKS = """
import json, os, sys
from pathlib import Path
import torch
from minigpt4.common.dist_utils import average_gradients
from minigpt4.runners import RunnerBase
from tests.golden_v2.model import V2, golden_model
from tests.models.test_lora import batch, text_alone
from tests.training import settings

root, rank = Path(sys.argv[1]), int(os.environ["RANK"])
cfg = settings(root)
cfg.pretty_print = lambda: None
folder = root / f"model_{rank}"
folder.mkdir()
with RunnerBase.launched(cfg):
    model = golden_model(V2, folder, chat_template=True, end_sym="</s>")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    # rank 1 never has an image; in the last step neither has
    for samples in (batch(model), text_alone()) if rank == 0 else (text_alone(), text_alone()):
        model(samples)["loss"].backward()
        average_gradients(trained)
        optimizer.step()
        optimizer.zero_grad()
    steps = [int(optimizer.state[parameter]["step"]) for parameter in trained]
    sums = [parameter.double().sum().item() for parameter in trained]
    json.dump({"steps": steps, "sums": sums}, open(root / f"found_{rank}.json", "w"))
"""


def text_alone():
    return {"instruction_input": ["List two animals."], "answer": ["a cat and a dog"]}


def test_two_ranks_train_what_they_can_when_one_has_no_image(tmp_path, shapes):
    """Neither waits forever; both have the same weights; a step without any image does not update the projection."""
    first, second, _ = found_by_two_ranks(TWO_RANKS, tmp_path)
    assert first == second
    assert first["steps"] == [2 if ".lora_" in name else 1 for name in shapes]  # 1: the projection
