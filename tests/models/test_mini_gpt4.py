"""The effects of the model's settings, on the small model of golden set c (random weights)."""

import json
import math
import shutil
from contextlib import nullcontext

import pytest
import torch
from omegaconf import OmegaConf

from minigpt4.common.registry import registry
from minigpt4.conversation.sampling import Sampling
from minigpt4.models import MiniGPT4, base_model
from minigpt4.models.llm import language_model
from minigpt4.text.prompts import prompt_problems
from tests.golden.model import CONFIG, FOLDER, golden_config, golden_model

SIZE, (HIDDEN, WIDTH) = CONFIG["image_size"], CONFIG["llama_proj"]
VOCABULARY, LAYERS = CONFIG["llama"]["vocab_size"], CONFIG["llama"]["num_hidden_layers"]
LLAMA = FOLDER / "model/llama"


def samples(texts, **more):
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randn(len(texts), 3, SIZE, SIZE, generator=generator),
        "text_input": texts,
        **more,
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return golden_model(tmp_path_factory.mktemp("model"))


def llama_with(folder, **changes):
    """Return a copy of the golden LLM folder with changes to its JSON files: {name without .json: changes}."""
    shutil.copytree(LLAMA, folder)
    for name, values in changes.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


# frozen parts


def test_registered_with_its_yaml():
    assert registry.get_model_class("mini_gpt4") is MiniGPT4
    assert (
        MiniGPT4.PRETRAINED_MODEL_CONFIG_DICT["pretrain_vicuna"] == "configs/models/minigpt4.yaml"
    )
    assert registry.get_model_class("minigpt4") is MiniGPT4  # as VLMEvalKit's file calls it


def test_only_llama_proj_learns_and_the_rest_stays_as_it_is(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    assert not any(
        part.training for name in model.frozen if hasattr(part := getattr(model, name), "modules")
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(samples(["a dog"]))["loss"].backward()
    optimizer.step()
    changed = [
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    ]
    model.load_state_dict(before)
    assert changed == ["llama_proj.weight", "llama_proj.bias"]


def test_parts_table(model):
    rows = {row.name: row for row in model.parts()}
    assert rows["llama_proj"].trainable == rows["llama_proj"].parameters == HIDDEN * WIDTH + WIDTH
    assert sum(row.trainable for row in rows.values()) == rows["llama_proj"].trainable
    assert (rows["llama_model"].dtype, rows["llama_model"].device) == ("float32", "cpu")
    assert rows["llama_model"].bytes == 4 * rows["llama_model"].parameters


def test_the_plan_is_what_is_built(tmp_path):
    cfg = golden_config(tmp_path, vit_precision="fp16", llm_precision="bf16")
    assert MiniGPT4.plan(cfg, "cpu") == MiniGPT4.from_config(cfg).parts()


def test_unfrozen_vision_trains_in_float32(tmp_path):
    model = golden_model(
        tmp_path,
        freeze_vit=False,
        freeze_qformer=False,
        vit_precision="fp16",
        use_grad_checkpoint=True,
    )
    assert {p.dtype for p in model.visual_encoder.parameters()} == {torch.float32}
    model.train()(samples(["a dog"]))["loss"].backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert model.visual_encoder.grad_checkpointing and not without
    assert not any(name.startswith("llama_model") for name in model.trainable_state_dict())


# precision and places


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_to_float32(model, tmp_path, precision):
    half = golden_model(tmp_path, vit_precision="fp16", llm_precision=precision)
    dtype = base_model.DTYPES[precision]
    types = {name: tensor.dtype for name, tensor in half.state_dict().items()}
    assert (
        types["visual_encoder.blocks.0.mlp.fc1.weight"]
        == types["llama_model.lm_head.weight"]
        == dtype
    )
    assert {
        types[f"visual_encoder.{name}"]
        for name in ("pos_embed", "cls_token", "blocks.0.attn.q_bias")
    } == {torch.float32}
    assert types["llama_proj.weight"] == types["Qformer.bert.layernorm.weight"] == torch.float32
    given = samples(["a brown dog sleeping", "snow"])
    assert half.encode_img(given["image"])[0].dtype == dtype
    # 8 bits of bfloat16 are 0.4 % an operation; the loss is about 7
    assert half(given)["loss"].item() == pytest.approx(model(given)["loss"].item(), abs=0.05)


def test_half_weights_become_float32_where_the_run_computes_in_it(tmp_path, caplog):
    with caplog.at_level("INFO"):
        model = golden_model(tmp_path, vit_precision="fp16", llm_precision="fp32")
    assert {p.dtype for p in model.visual_encoder.parameters()} == {torch.float32}
    assert "vision encoder in float32: this run does not compute in half precision" in caplog.text


def test_auto_precision():
    assert base_model.resolve_compute_dtype("auto", torch.device("cuda")) == torch.float16
    assert base_model.resolve_compute_dtype("auto", torch.device("cpu")) in (
        torch.bfloat16,
        torch.float32,
    )
    assert base_model.resolve_compute_dtype("bf16", torch.device("cpu")) == torch.bfloat16


def test_8_bit_llm_answers_and_trains(model, tmp_path):
    small = golden_model(tmp_path, low_resource=True)
    weight = small.llama_model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.int8
    given = samples(["a brown dog sleeping", "snow"])
    loss = small(given)["loss"]
    loss.backward()
    # 8-bit weights: about 0.5 % each
    assert loss.item() == pytest.approx(model(given)["loss"].item(), abs=0.1)
    assert small.llama_proj.weight.grad.abs().sum() > 0


def test_works_without_a_network_or_a_hub(tmp_path, monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert golden_model(tmp_path).llama_proj.weight.isfinite().all()


# images


def test_picture_of_another_size_is_refused(model):
    message = rf"^image: \[1, 3, 56, 56\]; expected \[B, 3, {SIZE}, {SIZE}\]: the processors' image_size must be model"
    with pytest.raises(ValueError, match=message):
        model.encode_img(torch.zeros(1, 3, 56, 56))


def test_pictures_of_a_batch_do_not_mix(model):
    image = samples(["a", "b", "c"])["image"]
    together, mask = model.encode_img(image)
    alone = torch.cat([model.encode_img(one[None])[0] for one in image])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert mask.tolist() == [[1] * together.shape[1]] * 3


# text and labels


def test_padding_does_not_change_the_loss(model):
    texts = ["a bus", "the old lighthouse keeper climbs the stairs"]
    given = samples(texts)
    counts = [model.rows(samples([text]))[0].num_targets for text in texts]
    alone = [
        model({"image": given["image"][i : i + 1], "text_input": texts[i : i + 1]})["loss"]
        for i in range(2)
    ]
    expected = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
    assert model(given)["loss"].item() == pytest.approx(expected.item(), abs=5e-6)


def test_labels_by_hand(model):
    inputs, num_text = model.build_inputs(samples(["a bus", ""]))
    queries = CONFIG["num_query_token"]
    end = model.llama_tokenizer("\n", add_special_tokens=False).input_ids
    text = model.llama_tokenizer("a bus\n", add_special_tokens=False).input_ids
    padding = [-100] * (len(text) - len(end))
    assert num_text == len(text)
    assert inputs["labels"].tolist() == [
        [-100] * (1 + queries) + text,
        [-100] * (1 + queries) + end + padding,
    ]
    assert inputs["attention_mask"].sum(1).tolist() == [
        1 + queries + len(text),
        1 + queries + len(end),
    ]


def test_end_token_as_a_target_is_a_choice(tmp_path):
    eos = 2
    texts = samples(["three bicycles", "a bus stops in front of the school"])
    masked = golden_model(tmp_path, end_sym="</s>")
    trained = golden_model(tmp_path, end_sym="</s>", mask_eos_labels=False)
    for model, number in ((masked, 0), (trained, 2)):
        labels = model.build_inputs(texts)[0]["labels"]
        assert (labels == eos).sum() == number
    assert trained(samples(["", ""]))["loss"].isfinite()
    message = r"\(model.max_txt_len=32\); model.end_sym is the end token: set model.mask_eos_labels=False$"
    with pytest.raises(ValueError, match=message):
        masked(samples(["", ""]))


def test_one_prompt_a_step_drawn_again_by_a_resumed_run(tmp_path):
    path = tmp_path / "prompts.txt"
    lines = [f"<Img><ImageHere></Img> Prompt {n}." for n in range(5)]
    path.write_text("\n".join(["no image here", *lines]))
    model = golden_model(
        tmp_path, prompt_path=str(path), prompt_template="###Human: {} ###Assistant: "
    )
    assert model.prompt_list == [f"###Human: {line} ###Assistant: " for line in lines]

    def drawn(seed):
        torch.manual_seed(seed)
        state = torch.random.get_rng_state()
        prompts = [model._draw_prompt({"iters": step}) for step in range(40)]
        assert torch.equal(torch.random.get_rng_state(), state)
        return prompts

    assert drawn(1) == drawn(1) != drawn(2)
    assert set(drawn(1)) == set(model.prompt_list)
    assert len({model._draw_prompt({}) for _ in range(40)}) == 5


def test_samples_may_bring_their_instruction(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("<Img><ImageHere></Img> Describe this image in detail.")
    model = golden_model(
        tmp_path, prompt_path=str(path), prompt_template="###Human: {} ###Assistant: "
    )
    texts = ["a bus", "red"]
    given = samples(
        texts, instruction=["", "Which colour does the very old bus in front of the school have?"]
    )
    inputs, _ = model.build_inputs(given)
    padding = (inputs["attention_mask"] == 0).sum(1)
    assert padding[0] > 0 and inputs["attention_mask"][1].all()  # the longer row is not padded
    counts = [model.rows(samples([text]))[0].num_targets for text in texts]
    alone = [
        model({key: value[i : i + 1] for key, value in given.items()} | {"iters": 0})["loss"].item()
        for i in range(2)
    ]
    expected = sum(loss * count for loss, count in zip(alone, counts, strict=True)) / sum(counts)
    # float32 noise of a padded batch beside single rows: 1e-6 here
    assert model(given | {"iters": 0})["loss"].item() == pytest.approx(expected, abs=5e-6)
    drawn = [
        model({"image": given["image"][i : i + 1], "text_input": texts[i : i + 1]})["loss"]
        for i in range(2)
    ]
    assert alone[0] == pytest.approx(drawn[0].item(), abs=5e-6)
    assert abs(alone[1] - drawn[1].item()) > 1e-3


PROMPTS = {
    "no file": (
        None,
        "{}",
        "model.prompt_path: no file at '{path}'; paths start from the current folder, or that of the YAML file",
    ),
    "two slots": (
        "# a comment\n<Img><ImageHere></Img> or <ImageHere>?",
        "{}",
        "model.prompt_path: '{path}' line 2 has 2 <ImageHere>; every prompt needs exactly one",
    ),
    "no slot": (
        "Describe it.",
        "{}",
        "model.prompt_path: no line of '{path}' has <ImageHere>; every prompt needs exactly one",
    ),
    "no template": (
        "<Img><ImageHere></Img>",
        "",
        "model.prompt_template: '' has 0 {{}}; expected exactly one, where the prompt goes",
    ),
    "template with two": (
        "<Img><ImageHere></Img>",
        "{} and {}",
        "model.prompt_template: '{{}} and {{}}' has 2 {{}}; expected exactly one, where the prompt goes",
    ),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompt_problems(case, tmp_path):
    text, template, message = PROMPTS[case]
    path = tmp_path / "prompts.txt"
    if text:
        path.write_text(text)
    assert str(prompt_problems(str(path), template)[0]) == message.format(path=path)
    with pytest.raises((ValueError, FileNotFoundError)):
        golden_model(tmp_path, prompt_path=str(path), prompt_template=template)


# language models


def test_random_weights_are_refused(tmp_path):
    with pytest.raises(ValueError) as caught:
        golden_model(tmp_path, check_llm=True)
    message = str(caught.value)
    assert message.startswith(f"model.llama_model: '{LLAMA}' does not read English: loss ")
    assert f"guessing among {VOCABULARY} tokens has {math.log(VOCABULARY):.2f}" in message
    assert "Most likely: a Vicuna delta that was not merged into LLaMA" in message
    assert message.endswith("--options model.check_llm=False")


def test_shards_that_lack_tensors_are_refused(tmp_path):
    folder = llama_with(tmp_path / "llama", config={"num_hidden_layers": LAYERS + 1})
    message = rf"^model.llama_model: the weight files in '{folder}' lack 9 tensors that its config.json asks for \(model.lay"
    with pytest.raises(ValueError, match=message):
        golden_model(tmp_path, llama_model=str(folder))


def test_end_tokens_of_old_conversions_come_from_config_json(tmp_path):
    empty = {"bos_token": "", "eos_token": ""}
    folder = llama_with(tmp_path / "llama", tokenizer_config=empty, special_tokens_map=empty)
    tokenizer = language_model.load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_another_family_of_llm(tmp_path):
    """GPT-2 with its own type of tokenizer: no BOS, spaces inside tokens, a tied output layer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    folder = tmp_path / "gpt2"
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(
        folder
    )
    config = GPT2Config(
        vocab_size=257, n_embd=24, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=256
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    model = golden_model(
        tmp_path, llama_model=str(folder), ckpt="", end_sym="<|im_end|>", mask_eos_labels=False
    )
    inputs, _ = model.build_inputs(samples(["ab", "a"]))
    a, b = (letters.index(letter) for letter in "ab")
    start = [-100] * CONFIG["num_query_token"]
    assert inputs["labels"].tolist() == [[*start, a, b, 256], [*start, a, 256, -100]]
    model(samples(["ab", "a"]))["loss"].backward()
    assert model.llama_proj.weight.grad.abs().sum() > 0


# the check before anything is loaded


def test_preflight_of_a_good_section(tmp_path):
    assert MiniGPT4.preflight(golden_config(tmp_path)) == []


def test_preflight_reports_everything(tmp_path):
    cfg = OmegaConf.merge(
        golden_config(tmp_path),
        {
            "vit_model": "clip",
            "vit_precision": "half",
            "llm_precision": "fp64",
            "max_txt_len": 0,
            "drop_path_rate": 1,
            "repetition_penalty": 0,
            "llama_model": str(tmp_path),
            "vit_ckpt": str(tmp_path / "none.pth"),
            "q_former_model": "https://example.org/blip2.pth",
            "ckpt": str(tmp_path),
            "prompt_path": "none.txt",
        },
    )
    assert [str(problem).split(":")[0] for problem in MiniGPT4.preflight(cfg, "model")] == [
        "model.vit_model",
        "model.vit_precision",
        "model.llm_precision",
        "model.max_txt_len",
        "model.drop_path_rate",
        "model.repetition_penalty",
        "model.llama_model",
        "model.vit_ckpt",
        "model.ckpt",
        "model.prompt_path",
    ]


def test_the_repetition_penalty_has_the_limits_of_a_chat(tmp_path):
    for value in (1e-3, 1e3, -1.0, 0.0, 9e-4, 1001.0, math.nan):
        cfg = golden_config(tmp_path)
        cfg.repetition_penalty = value
        is_wrong = bool(MiniGPT4.preflight(cfg))
        with pytest.raises(ValueError) if is_wrong else nullcontext():
            Sampling(repetition_penalty=value)


@pytest.mark.parametrize("rate", [-0.5, 1.0, math.nan])
def test_a_drop_path_rate_is_a_share(rate, tmp_path):
    cfg = golden_config(tmp_path)
    cfg.drop_path_rate = rate
    (problem,) = MiniGPT4.preflight(cfg)
    assert str(problem) == f"model.drop_path_rate: {rate}; expected a number from 0 to below 1"


def test_import_costs_torch_only():
    import subprocess
    import sys

    probe = "import sys, minigpt4.models; print([m for m in ('timm', 'transformers', 'bitsandbytes') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_a_template_is_checked_also_where_no_prompt_is_drawn():
    (problem,) = prompt_problems("", "Describe it.")
    message = "model.prompt_template: 'Describe it.' has 0 {}; expected exactly one, where the prompt goes"
    assert str(problem) == message
    assert prompt_problems("", "") == prompt_problems("", "[INST] {} [/INST] ") == []
