"""Names and calls that other people's scripts rely on: the 2023 demo's and those of VLMEvalKit's MiniGPT-4 adapter."""

import inspect

import pytest
import torch

from minigpt4.conversation.chat import Sampling
from minigpt4.conversation.conversation import (
    CONV_VISION,
    Chat,
    CONV_VISION_LLama2,
    CONV_VISION_minigptv2,
    CONV_VISION_Vicuna0,
    StoppingCriteriaSub,
)
from tests.golden import GOLDEN

IMAGE = str(next((GOLDEN / "h_conversation/images").glob("*.png")))


def test_the_2023_demo(golden_model, vis_processor):
    chat = Chat(golden_model, vis_processor, device="cpu")
    chat_state, img_list = CONV_VISION.copy(), []
    assert chat.upload_img(IMAGE, chat_state, img_list) == "Received."
    chat.ask("What is it?", chat_state)
    message = chat.answer(
        conv=chat_state, img_list=img_list, num_beams=1, temperature=1, max_new_tokens=9, max_length=500
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
    streamer = chat.stream_answer(conv=chat_state, img_list=img_list, temperature=0.6, max_new_tokens=9, max_length=500)
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


def test_argument_order_and_defaults_of_2023():
    assert list(inspect.signature(Chat.__init__).parameters)[1:3] == ["model", "vis_processor"]
    defaults = {name: value.default for name, value in inspect.signature(Sampling).parameters.items()}
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
