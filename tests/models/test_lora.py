"""LoRA: gradients of every path are transformers' own, its names are all read, merged and unmerged answer alike."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt4.common.checkpoint import CheckpointError
from minigpt4.models.llm import adapters
from tests.golden_v2 import GOLDEN
from tests.golden_v2.model import golden_config, golden_model
from tests.training import found_by_two_ranks

ATOL = 1e-5  # float32; gradients are up to 3, measured differences up to 3e-6
CKPT = GOLDEN / "model/minigpt_v2_ckpt.safetensors"


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
    return golden_model("b_minigpt_v2", tmp_path, chat_template=True, end_sym="</s>")


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_loss(model, samples):
    """Return the loss that the model of transformers gives of a padded batch."""
    inputs, _ = model.build_inputs(samples)
    return model.llama_model(**inputs).loss


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("backend", ["packed", "padded"])
def test_gradients_are_those_of_transformers(model, backend, checkpointing):
    samples = batch(model)
    expected = gradients(model, plain_loss(model, samples))
    assert sum(".lora_" in name for name in expected) == 8 and len(expected) == 10
    assert model.choose_backend() == "packed"  # lean layers give no gradient to the LLM's weights
    model.llm_backend, model.llm_checkpointing = backend, checkpointing
    found = gradients(model, model(samples)["loss"])
    assert found.keys() == expected.keys()
    errors = {name: (found[name] - expected[name]).abs().max().item() for name in found}
    print(f"largest difference of a gradient, {backend}: {max(errors.values()):.1e}")
    assert max(errors.values()) <= ATOL


def test_gradients_with_weights_in_8_bits(tmp_path):
    """Packed and plain agree on the same weights; what 8 bits change is printed, and is no more than a few percent."""
    whole = golden_model("b_minigpt_v2", tmp_path, chat_template=True, end_sym="</s>")
    (tmp_path / "int8").mkdir()
    small = golden_model("b_minigpt_v2", tmp_path / "int8", chat_template=True, end_sym="</s>", llm_quantization="int8")
    assert {type(part).__name__ for part in small.llama_model.modules()} >= {"Int8Linear", "Linear"}
    samples = batch(whole)
    expected = gradients(small, plain_loss(small, samples))
    found = gradients(small, small(samples)["loss"])
    assert max((found[name] - expected[name]).abs().max().item() for name in found) <= ATOL
    exact = gradients(whole, whole(samples)["loss"])
    exact, found = (torch.cat([each[name].flatten() for name in sorted(exact)]) for each in (exact, found))
    error = ((found - exact).norm() / exact.norm()).item()
    print(f"int8 moves the gradient by {error:.1%}")
    assert error < 0.1


def test_a_batch_in_parts_and_reordered_has_the_same_loss(model):
    """Samples of one image, several, none and several turns: rows do not see each other."""
    samples = batch(model)
    losses = model(samples, reduction="none")
    for part, _ in model.split(samples, max_tokens=1):
        alone = model(part, reduction="none")
        place = losses["num_targets"].tolist().index(alone["num_targets"].item())
        assert alone["loss"].item() == pytest.approx(losses["loss"][place].item(), abs=1e-4)
    total = sum(share * model(part)["loss"].item() for part, share in model.split(samples, max_tokens=60))
    assert total == pytest.approx(model(samples)["loss"].item(), abs=1e-5)


def test_updates_drop_inputs_in_training_alone(model):
    samples = batch(model)
    model.train()
    assert not model.llama_model.training and not model.visual_encoder.training
    torch.manual_seed(0)
    first, second = model(samples)["loss"].item(), model(samples)["loss"].item()
    assert first != second and model.llm_backend == "packed"  # the drop does not count in the choice
    model.eval()
    assert model(samples)["loss"].item() == model(samples)["loss"].item()
    dropped = [part.p for part in model.llama_model.modules() if isinstance(part, torch.nn.Dropout)]
    assert dropped == [0.05] * 4  # Source: the newest release


def test_a_new_update_changes_nothing(tmp_path):
    """B is zero: the LLM answers as it is, and only the updates and the projection train."""
    model = golden_model("b_minigpt_v2", tmp_path, ckpt="")
    (tmp_path / "plain").mkdir()
    plain = golden_model("b_minigpt_v2", tmp_path / "plain", ckpt="", lora_r=0)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.llama_model(ids).logits, plain.llama_model(ids).logits, rtol=0, atol=0)
    assert all(name.startswith("llama_proj") or ".lora_" in name for name in model.trainable_state_dict())
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
    model = golden_model("b_minigpt_v2", tmp_path, llm_quantization="int8")
    with pytest.raises(ValueError, match=r"^weights in 8 or 4 bits cannot take LoRA in; load the LLM with model.llm_q"):
        adapters.merge(model.llama_model)


# names


def newer(name):
    """Return what peft since 0.3 calls a tensor of LoRA."""
    return name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")


@pytest.mark.parametrize("rename", [str, newer], ids=["peft 0.2", "peft 0.3 and later"])
def test_all_names_of_peft_are_read(tmp_path, rename):
    state = {rename(name): tensor for name, tensor in load_file(CKPT).items()}
    layer = "llama_model.base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq"
    state[layer] = torch.ones(8)  # a constant that the release saves
    save_file(state, tmp_path / "v2.safetensors")
    model = golden_model("b_minigpt_v2", tmp_path, ckpt=str(tmp_path / "v2.safetensors"))
    saved, expected = model.trainable_state_dict(), load_file(CKPT)
    assert saved.keys() == expected.keys()  # the release's
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


def broken(folder, change, **settings):
    """Return the error of loading the v2 checkpoint with a change."""
    state = load_file(CKPT)
    change(state)
    save_file(state, folder / "v2.safetensors")
    with pytest.raises(CheckpointError) as caught:
        golden_model("b_minigpt_v2", folder, ckpt=str(folder / "v2.safetensors"), **settings)
    return str(caught.value).replace(str(folder), "DIR")


def lora(state):
    return sorted(name for name in state if ".lora_" in name)


def take_half(state):
    for name in lora(state)[:4]:
        del state[name]


def write_twice(state):
    name = lora(state)[0]
    state[newer(name)] = state[name].clone()


def other_adapter(state):
    name = lora(state)[0]
    state[name.replace(".weight", ".mine.weight")] = state.pop(name)


def not_finite(state):
    state[lora(state)[0]][0, 0] = float("nan")


FIRST = "llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A"
MISTAKES = {
    "half": (take_half, {}, "model.ckpt: 'DIR/v2.safetensors' does not fit: 4 tensors are missing ("),
    "twice": (
        write_twice,
        {},
        f"model.ckpt: 'DIR/v2.safetensors': {FIRST}.weight is there twice, in the names of two versions of peft; keep "
        "one of them",
    ),
    "another adapter": (other_adapter, {}, f"1 tensor is missing ({FIRST}.weight [4, 64])"),
    "rank": (dict, {"lora_r": 8}, "It has LoRA of rank 4, the model 8: set model.lora_r=4, as for MiniGPT-v2"),
    "frozen LLM": (dict, {"lora_r": 0}, "It has LoRA of rank 4, the model none: set model.lora_r=4, as for MiniGPT-v2"),
    "not finite": (not_finite, {}, "holds numbers that are not finite: 1 tensor is bad ("),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(tmp_path, mistake):
    change, settings, expected = MISTAKES[mistake]
    said = broken(tmp_path, change, **settings)
    assert expected in said or expected.replace("twice", "") in said, said


def test_weights_of_v2_are_not_those_of_llama2_chat(tmp_path):
    config = json.loads((GOLDEN / "b_minigpt_v2/config.json").read_text())
    with pytest.raises(CheckpointError, match=rf"\. It has LoRA of rank {config['lora_r']}, the model none: set model"):
        golden_model("c_llama2", tmp_path, ckpt=str(CKPT))


def test_a_checkpoint_without_lora_begins_anew_and_says_so(tmp_path, caplog):
    state = {name: tensor for name, tensor in load_file(CKPT).items() if ".lora_" not in name}
    save_file(state, tmp_path / "projection.safetensors")
    golden_model("b_minigpt_v2", tmp_path, ckpt=str(tmp_path / "projection.safetensors"))
    assert "has no LoRA; the model's starts anew, from the LLM as it is" in caplog.text


def test_an_llm_without_such_layers(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    llm = GPTNeoXForCausalLM(GPTNeoXConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9))
    message = (
        r"^model.lora_r: 4, and GPTNeoXForCausalLM has no layers q_proj and v_proj for LoRA; take an LLM of LLaMA's"
    )
    with pytest.raises(ValueError, match=message):
        adapters.add_lora(llm, 4, 6)


def test_the_plan_counts_what_trains(tmp_path):
    """On the meta device, before weights are loaded: parts, and the checkpoint's names."""
    cfg = golden_config("b_minigpt_v2", tmp_path)
    parts = {part.name: part for part in type(golden_model("b_minigpt_v2", tmp_path)).plan(cfg, "cpu")}
    config = json.loads((GOLDEN / "b_minigpt_v2/config.json").read_text())
    sizes = {name: torch.Size(shape).numel() for name, shape in config["trainable"].items()}
    assert parts["llama_model"].trainable == sum(size for name, size in sizes.items() if ".lora_" in name)
    assert parts["llama_proj"].trainable == sizes["llama_proj.weight"] + sizes["llama_proj.bias"]


TWO_RANKS = """
import json, os, sys
from pathlib import Path
import torch
from minigpt4.common.dist_utils import average_gradients
from minigpt4.runners import RunnerBase
from tests.golden_v2.model import golden_model
from tests.models.test_lora import batch, text_alone
from tests.training import settings

root, rank = Path(sys.argv[1]), int(os.environ["RANK"])
cfg = settings(root)
cfg.pretty_print = lambda: None
folder = root / f"model_{rank}"
folder.mkdir()
with RunnerBase.launched(cfg):
    model = golden_model("b_minigpt_v2", folder, chat_template=True, end_sym="</s>")
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


def test_two_ranks_train_what_they_can_when_one_has_no_image(tmp_path):
    """Neither waits; both have the same weights; a step without any image leaves the projection alone on both."""
    first, second, _ = found_by_two_ranks(TWO_RANKS, tmp_path)
    assert first == second
    assert first["steps"] == [2] * 8 + [1] * 2  # LoRA, then weight and bias of the projection
