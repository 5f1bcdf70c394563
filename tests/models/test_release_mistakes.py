"""Wrong inputs of the newest release's models: each has one exact message, before anything is lost."""

import pytest
import torch
from safetensors.torch import save_file

from minigpt4.common.checkpoint import CheckpointError
from minigpt4.models.mini_gpt4_config import find_problems
from tests.golden import model as golden_2023
from tests.golden_v2 import GOLDEN
from tests.golden_v2.model import golden_config, golden_model

NO_QFORMER = GOLDEN / "model/minigpt4_noqf_ckpt.safetensors"
IMAGE = "<Img><ImageHere></Img> "


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return golden_model("b_minigpt_v2", tmp_path_factory.mktemp("v2"), chat_template=True, end_sym="</s>")


def images(model, *shape):
    return torch.zeros(*shape, 3, model.image_size, model.image_size)


SEVERAL = "the text of 1 of the batch's 2 samples cannot be read ({}). Correct or remove them, or let the dataset skip "
SEVERAL += "them: docs/custom_data.md"
# name: (samples by the model, message)
BATCHES = {
    "no image slot": (
        lambda m: {"image": images(m, 2), "instruction_input": [f"{IMAGE}a ", "b "], "answer": ["c", "d"]},
        SEVERAL.format("1: turns: 0 image slots in the questions, the sample has 1 images"),
    ),
    "more slots than images": (
        lambda m: {"image": images(m, 2), "instruction_input": [IMAGE * 2, IMAGE], "answer": ["c", "d"]},
        SEVERAL.format("0: turns: 2 image slots in the questions, the sample has 1 images"),
    ),
    "a slot without an image": (
        lambda m: {"instruction_input": [f"{IMAGE}a ", "b "], "answer": ["c", "d"]},
        SEVERAL.format("0: turns: 1 image slots in the questions, the sample has 0 images"),
    ),
    "fewer answers than questions": (
        lambda m: {"conv_q": ["a#b#c"], "conv_a": ["d"], "connect_sym": ["#"], "sample_id": ["x.json record 7"]},
        "sample x.json record 7: 3 questions in conv_q, 1 answers in conv_a; expected as many, joined by '#'",
    ),
    "more answers than questions": (
        lambda m: {"conv_q": ["a"], "conv_a": ["d!@#e"], "connect_sym": ["!@#"]},
        "sample 0: 1 questions in conv_q, 2 answers in conv_a; expected as many, joined by '!@#'",
    ),
    "no symbol between turns": (
        lambda m: {"conv_q": ["a"], "conv_a": ["d"]},
        "sample 0: conv_q without connect_sym; expected what joins its turns, such as '!@#'",
    ),
    "length above the images": (
        lambda m: {"image": images(m, 2, 2), "answer": ["c", "d"], "length": [2, 3]},
        "length: [2, 3]; expected for each of 2 samples 0 to 2, its images",
    ),
    "length of another number of samples": (
        lambda m: {"image": images(m, 2, 2), "answer": ["c", "d"], "length": [2]},
        "length: [2]; expected for each of 2 samples 0 to 2, its images",
    ),
    "images of another size": (
        lambda m: {"image": torch.zeros(1, 3, 28, 28), "instruction_input": [IMAGE], "answer": ["c"]},
        "image: [1, 3, 28, 28]; expected [B, 3, {size}, {size}]: the processors' image_size must be model.image_size",
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches(model, name):
    make, message = BATCHES[name]
    with pytest.raises(ValueError) as caught:
        model(make(model))
    assert str(caught.value) == message.replace("{size}", str(model.image_size))


# name: (call, message)
CALLS = {
    "generate: fewer texts": (
        lambda m: m.generate(images(m, 2), ["a"]),
        "2 images and 1 texts; expected a list of texts, one for each image",
    ),
    "generate: one text": (
        lambda m: m.generate(images(m, 1), IMAGE),
        "1 images and a text; expected a list of texts, one for each image",
    ),
    "generate: no slot": (
        lambda m: m.generate(images(m, 1), ["a"]),
        "texts[0]: 'a' has 0 <ImageHere>; expected exactly one",
    ),
    "multi_select: one list too short": (
        lambda m: m.multi_select(images(m, 2), [IMAGE, IMAGE], [["a", "b"], ["c"]]),
        "answers: 1 in one list; expected one for each of 2 prompts",
    ),
    "multi_select: score": (
        lambda m: m.multi_select(images(m, 1), [IMAGE], [["a"]], score="max"),
        "score: 'max'; expected one of sum, mean",
    ),
    "reduction": (
        lambda m: m({"answer": ["a"]}, reduction="sum"),
        "reduction: 'sum'; expected 'mean' or 'none'",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(model, name):
    call, message = CALLS[name]
    with pytest.raises(ValueError) as caught:
        call(model)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lora_r", -1, "model.lora_r: -1; expected a rank, or 0 for a frozen LLM"),
        ("lora_alpha", 0, "model.lora_alpha: 0; expected at least 1"),
        ("max_context_len", 0, "model.max_context_len: 0; expected at least 1"),
        (
            "prompt_template",
            "[INST] [/INST]",
            "model.prompt_template: '[INST] [/INST]' has 0 {}; expected exactly one, where the prompt goes",
        ),
    ],
)
def test_configurations(tmp_path, key, value, message):
    cfg = golden_config("b_minigpt_v2", tmp_path, **{key: value})
    assert list(map(str, find_problems(cfg, "model"))) == [message]


def test_an_image_whose_patches_do_not_come_out_even(tmp_path):
    patch = golden_model("b_minigpt_v2", tmp_path).visual_encoder.patch_embed.patch_size[0]
    message = (
        rf"^model.image_size: {5 * patch} gives 25 patches, which do not come out even in groups of 4; without a Q-F"
    )
    with pytest.raises(ValueError, match=message):
        golden_model("b_minigpt_v2", tmp_path, image_size=5 * patch)


def test_a_checkpoint_behind_a_qformer_for_a_model_without_one(tmp_path):
    theirs = str(golden_2023.FOLDER / "model/minigpt4_ckpt.safetensors")
    with pytest.raises(
        CheckpointError, match=r"projects image vectors of width \d+, the model has \d+-wide ones: those of"
    ):
        golden_model("a_minigpt4_noqf", tmp_path, ckpt=theirs)


def test_a_checkpoint_of_merged_patches_for_a_model_with_qformer(tmp_path):
    with pytest.raises(CheckpointError, match=r"; set model.has_qformer as it was trained$"):
        golden_2023.golden_model(tmp_path, ckpt=str(NO_QFORMER))


def test_a_checkpoint_of_a_wider_llm(tmp_path):
    save_file(
        {"llama_proj.weight": torch.zeros(80, 8), "llama_proj.bias": torch.zeros(80)}, tmp_path / "wide.safetensors"
    )
    with pytest.raises(
        CheckpointError, match=r"was trained for a 80-wide LLM, model.llama_model is \d+ wide; give a check"
    ):
        golden_model("b_minigpt_v2", tmp_path, ckpt=str(tmp_path / "wide.safetensors"))
