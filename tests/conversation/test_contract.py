"""Names and calls that other people's scripts rely on: the 2023 demo's and those of VLMEvalKit's MiniGPT-4 adapter."""

import argparse
import copy
import inspect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import TextIteratorStreamer

import minigpt4
from minigpt4.conversation.chat import Sampling
from minigpt4.conversation.conversation import (
    CHATML,
    CONV_VISION,
    VICUNA_V0,
    Chat,
    CONV_VISION_LLama2,
    CONV_VISION_minigptv2,
    CONV_VISION_Vicuna0,
    Conversation,
    SeparatorStyle,
    StoppingCriteriaSub,
)
from minigpt4.models.trained_with import trained_text
from minigpt4.processors import Blip2ImageEvalProcessor
from tests.golden import GOLDEN

ROOT = Path(__file__).resolve().parents[2]
IMAGE = str(next((GOLDEN / "h_conversation/images").glob("*.png")))


def test_the_2023_demo(golden_model, vis_processor):
    chat = Chat(golden_model, vis_processor, device="cpu")
    chat_state, img_list = CONV_VISION.copy(), []
    assert chat.upload_img(IMAGE, chat_state, img_list) == "Received."
    chat.ask("What is it?", chat_state)
    message = chat.answer(
        conv=chat_state,
        img_list=img_list,
        num_beams=1,
        temperature=1,
        max_new_tokens=9,
        max_length=500,
    )[0]
    assert chat_state.messages[-1] == [chat_state.roles[1], message]
    chat_state.messages = []
    assert chat_state.get_prompt() == CONV_VISION.get_prompt()


def test_the_newest_demo(golden_model, vis_processor):
    chat = Chat(golden_model, vis_processor, device="cpu")
    chat_state, img_list = CONV_VISION_LLama2.copy(), []
    chat.upload_img(IMAGE, chat_state, img_list)
    if not isinstance(img_list[0], torch.Tensor):
        chat.encode_img(img_list)
    chat.ask("What is it?", chat_state)
    streamer = chat.stream_answer(
        conv=chat_state, img_list=img_list, temperature=0.6, max_new_tokens=9, max_length=500
    )
    output = "".join(streamer)
    assert chat_state.messages[-1] == [chat_state.roles[1], output]


@pytest.mark.parametrize("template, beams", [(CONV_VISION_Vicuna0, 1), (CONV_VISION_minigptv2, 5)])
def test_vlmevalkit(golden_model, vis_processor, template, beams):
    """The calls of its adapter, in its order, with transformers' list of criteria."""
    from transformers import StoppingCriteriaList

    stops = [torch.tensor(ids) for ids in ([835], [2277, 29937])]
    criteria = StoppingCriteriaList([StoppingCriteriaSub(stops=stops)])
    chat = Chat(golden_model, vis_processor, device=golden_model.device, stopping_criteria=criteria)
    kwargs = {
        "max_new_tokens": 20,
        "num_beams": beams,
        "min_length": 1,
        "top_p": 0.9,
        "repetition_penalty": 1.0,
        "length_penalty": -1.0 if beams > 1 else 1.0,
        "temperature": 1.0,
        "max_length": 500,
    }
    chat_state, img_list = template.copy(), []
    _ = chat.upload_img(IMAGE, chat_state, img_list)
    chat.encode_img(img_list)
    chat.ask("What is it?", chat_state)
    with torch.inference_mode():
        generation_dict = chat.answer_prepare(chat_state, img_list, **kwargs)
        generation_dict["do_sample"] = False
        output_token = chat.model_generate(**generation_dict)[0]
        text = chat.model.llama_tokenizer.decode(output_token, skip_special_tokens=True)
    wanted = chat.answer(chat_state.copy(), img_list, **{**kwargs, "do_sample": False})[0]
    assert text.split("###")[0].strip() == wanted
    # as streaming servers call it, from a thread
    streamer = TextIteratorStreamer(
        chat.model.llama_tokenizer, skip_special_tokens=True, timeout=60
    )
    with ThreadPoolExecutor(1) as thread:
        thread.submit(chat.model_generate, streamer=streamer, **generation_dict)
        assert "".join(streamer).split("###")[0].strip() == wanted
        thread.submit(chat.model_generate, streamer=streamer, context=None)
        assert "".join(streamer) == ""  # a failure ends it, too


def test_a_checkpoint_knows_its_template():
    """What ours and 2023's trainers saved; other programs' files say nothing, whatever they hold."""
    chatml = {"prompt_template": CHATML.training, "end_sym": "<|im_end|>"}
    other = {"prompt_template": "{}", "end_sym": "\n"}
    known = CHATML.training, "<|im_end|>"
    for content, wanted in [
        ({"progress": {"identity": chatml}, "config": {"model": other}}, known),
        ({"config": {"model": chatml}}, known),
        ({"progress": {"identity": {"llm": {}}}, "config": {"model": chatml}}, known),
        ({"config": {"model": {"prompt_template": ""}}}, None),
        ({"config": {"model": {"prompt_template": None}}}, None),
        ({"config": {"model": [1]}, "progress": "x"}, None),
        ({"config": 3, "progress": [{"identity": chatml}]}, None),
        ({}, None),
        ([], None),
    ]:
        assert trained_text(content) == wanted, content


def test_a_template_that_is_not_the_checkpoints_is_said_once(golden_model, vis_processor, caplog):
    model = copy.copy(golden_model)
    model.trained_text = VICUNA_V0.training, "###"
    chat = Chat(model, vis_processor)

    def warnings(conv):
        caplog.clear()
        conv = conv.copy()
        chat.ask("What is it?", conv)
        chat.answer(conv, [], max_new_tokens=2, temperature=0)
        return [
            record.getMessage()
            for record in caplog.records
            if "was trained with" in record.getMessage()
        ]

    own = Conversation(
        VICUNA_V0.system[:-3], ("Human", "Assistant"), [], 0, SeparatorStyle.SINGLE, "###"
    )
    for conv in (CONV_VISION, CONV_VISION_Vicuna0, own):
        assert not warnings(conv)
    for conv, words in (
        (CONV_VISION_LLama2, "'[INST] '"),
        (Conversation(CHATML), "'<|im_start|>user"),
    ):
        (warning,) = warnings(conv)
        assert (
            words in warning and repr(VICUNA_V0.training) in warning and "minigpt4.load" in warning
        )
        chat = Chat(model, vis_processor)  # evaluation kits make one for each image
        assert not warnings(conv)  # once is enough
    model.trained_text = "", "\n"  # of stage 1: no template at all
    assert not warnings(CONV_VISION_minigptv2)


def test_loading_compares_the_yaml_with_the_checkpoint(release, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(release.root / "torch"))
    saved = torch.load(release.checkpoint)
    saved["config"] = {"model": {"prompt_template": CHATML.training, "end_sym": "<|im_end|>"}}
    torch.save(saved, tmp_path / "chatml.pth")
    options = release.options(
        **{"model.low_resource": False, "model.ckpt": tmp_path / "chatml.pth"}
    )[1:]
    chat, conv = minigpt4.load(str(ROOT / "eval_configs/minigpt4_eval.yaml"), options, "cpu")
    assert conv.template is VICUNA_V0 and chat.model.prompt_list == []
    assert sum("was trained with" in record.getMessage() for record in caplog.records) == 1


def test_argument_order_and_defaults_of_2023():
    assert list(inspect.signature(Chat.__init__).parameters)[1:3] == ["model", "vis_processor"]
    defaults = {
        name: value.default for name, value in inspect.signature(Sampling).parameters.items()
    }
    assert list(defaults.items())[:8] == [
        ("max_new_tokens", 300),
        ("num_beams", 1),
        ("min_length", 1),
        ("top_p", 0.9),
        ("repetition_penalty", 1.0),
        ("length_penalty", 1),
        ("temperature", 1.0),
        ("max_length", 2000),
    ]
    assert defaults["top_k"] == 50


@pytest.mark.parametrize("is_plain", [False, True], ids=["Config", "a plain section"])
def test_evaluation_kits_build_the_model(release, tmp_path, is_plain, caplog):
    """Their calls from the file on: names, attributes, a device by name, and a model moved afterwards."""
    from omegaconf import OmegaConf

    from minigpt4.common.config import Config
    from minigpt4.common.registry import registry

    cfg_path = tmp_path / "minigpt4_eval.yaml"
    text = (ROOT / "eval_configs/minigpt4_eval.yaml").read_text()
    text = text.replace("'/path/to/pretrained/ckpt/'", f"'{release.checkpoint}'")
    text = text.replace("arch: mini_gpt4", f"arch: mini_gpt4\n  llama_model: '{release.llama}'")
    for key, name in (("vit_ckpt", "eva_vit_g"), ("q_former_model", "blip2_pretrained_flant5xxl")):
        text = text.replace(
            "arch: mini_gpt4", f"arch: mini_gpt4\n  {key}: '{release.hub / name}.pth'"
        )
    cfg_path.write_text(text.replace("prompts/alignment.txt", f"{ROOT}/prompts/alignment.txt"))
    if is_plain:
        cfg = OmegaConf.load(cfg_path)
        model_config, datasets = cfg.model, cfg.datasets
    else:
        cfg = Config(argparse.Namespace(cfg_path=str(cfg_path), options=None, gpu_id=0))
        model_config, datasets = cfg.model_cfg, cfg.datasets_cfg
    model_config.device_8bit = "cpu" if is_plain else 0
    model = registry.get_model_class(model_config.arch).from_config(model_config).to("cpu").eval()
    processor_config = datasets.cc_sbu_align.vis_processor.train
    vis_processor = registry.get_processor_class(processor_config.name).from_config(
        processor_config
    )
    chat = Chat(model, vis_processor, device="cpu", stopping_criteria=None)
    for template, is_its_own in ((CONV_VISION_Vicuna0, True), (CONV_VISION_minigptv2, False)):
        caplog.clear()
        chat_state, img_list = template.copy(), []
        chat.upload_img(IMAGE, chat_state, img_list)
        chat.encode_img(img_list)
        chat.ask("What is it?", chat_state)
        assert chat.answer(chat_state, img_list, max_new_tokens=5, temperature=0)[1].size >= 1
        assert ("was trained with" in caplog.text) is not is_its_own


def test_an_image_processor_of_another_size_is_fitted_and_said(golden_model, vis_processor, caplog):
    large = Blip2ImageEvalProcessor(224, mean=[0.5, 0.5, 0.5])
    chat = Chat(golden_model, large)
    assert "image_size: 224 in the image processor, the model takes 42" in caplog.text
    same = Chat(
        golden_model, Blip2ImageEvalProcessor(golden_model.image_size, mean=[0.5, 0.5, 0.5])
    )
    assert torch.equal(chat.encode_images([IMAGE])[0], same.encode_images([IMAGE])[0])
    caplog.clear()
    assert Chat(golden_model, vis_processor).vis_processor is vis_processor and not caplog.text


def test_an_image_processor_that_names_no_mean_takes_the_towers(golden_model, monkeypatch, caplog):
    pixels = golden_model.pixels._replace(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    monkeypatch.setattr(golden_model, "pixels", pixels)
    fitted = Chat(golden_model, Blip2ImageEvalProcessor(pixels.size)).vis_processor
    assert (fitted.image_size, fitted.mean, fitted.std) == (pixels.size, [0.5] * 3, [0.25] * 3)
    assert "mean: [0.48145466, 0.4578275, 0.40821073] in the image processor" in caplog.text
    # one that is named stays
    named = Blip2ImageEvalProcessor(pixels.size, mean=[0.1, 0.2, 0.3])
    fitted = Chat(golden_model, named).vis_processor
    assert (fitted.mean, fitted.std) == ([0.1, 0.2, 0.3], [0.25] * 3)
