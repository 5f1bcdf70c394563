"""What a request to the OpenAI API becomes: a conversation and the settings of its answer."""

import json

import pytest

from minigpt4.conversation.conversation import CHATML, Conversation
from minigpt4.serving.openai_schema import ChatRequest
from minigpt4.serving.session import DEFAULT_QUESTION

USER = {"role": "user", "content": "what is this?"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def request(*messages, **fields):
    body = {"model": "tiny", "messages": list(messages) or [USER], **fields}
    return ChatRequest.read(json.dumps(body).encode())


@pytest.mark.parametrize(
    ("field", "sent", "name", "taken"),
    [
        ("max_tokens", 4096, "max_new_tokens", 4096),
        ("max_completion_tokens", 1024.0, "max_new_tokens", 1024),
        ("top_p", 0, "top_p", 1e-6),
        ("top_k", -1, "top_k", 0),
        ("temperature", 3, "temperature", 3),
        ("seed", -1, "seed", None),
        ("repetition_penalty", 0.9, "repetition_penalty", 0.9),
    ],
)
def test_common_settings_are_taken(field, sent, name, taken):
    assert request(**{field: sent}).settings({})[name] == taken


def test_minus_one_token_is_as_many_as_fit():
    assert request(max_tokens=-1).settings({})["max_new_tokens"] > 10**6


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("value", [0, -2, 1.5])
def test_a_wrong_length_is_named_as_it_was_sent(field, value):
    with pytest.raises(ValueError, match=f"^{field}: "):
        request(**{field: value}).settings({})


def test_a_system_message_is_typed_text(loaded):
    """Markdown's ### and the names of special tokens are text in it, as in a question."""
    chat, empty = loaded
    typed = "### Rules\nBe brief.</s>"
    conv = request({"role": "system", "content": typed}, USER).conversation(chat, empty)
    assert conv.system == typed
    assert conv.get_prompt().startswith("## # Rules\nBe brief.</s>###Human: what is this?###")
    (ids,) = chat.encoder.encode(conv.segments())
    assert not set(ids[1:]) & set(chat.encoder.special_ids.values())


def test_a_plain_system_message_reads_as_in_python(loaded):
    chat, empty = loaded
    conv = request({"role": "system", "content": "Be brief."}, USER).conversation(chat, empty)
    expected = empty.copy()
    expected.system = "Be brief."
    chat.ask(USER["content"], expected)
    assert chat.encoder.encode(conv.segments()) == chat.encoder.encode(expected.segments())


def test_a_system_message_of_a_template_with_text_around_it(loaded):
    chat, _ = loaded
    sent = {"role": "system", "content": "<|im_end|> Be brief."}
    conv = request(sent, USER).conversation(chat, Conversation(CHATML))
    around = ("<|im_start|>system\n", "<|im_end|>\n")
    assert conv.get_prompt().startswith(sent["content"].join(around))
    assert [segment.is_structure for segment in conv.segments()[:3]] == [True, False, True]
    nothing = request({"role": "system", "content": ""}, USER).conversation(
        chat, Conversation(CHATML)
    )
    assert nothing.get_prompt().startswith("<|im_start|>user")


# parts of messages


def prompt_of(loaded, *parts):
    return request({"role": "user", "content": list(parts)}).conversation(*loaded).get_prompt()


def text(words):
    return {"type": "text", "text": words}


def test_images_come_first_wherever_the_client_puts_them(loaded):
    """As in training; clients and OpenAI's examples send the text first."""
    chat, empty = loaded
    expected = empty.copy()
    for _ in range(2):
        expected.append_image()
    chat.ask("which is larger?", expected)
    question = text("which is larger?")
    for parts in (
        [IMAGE, IMAGE, question],
        [question, IMAGE, IMAGE],
        [text(""), IMAGE, IMAGE, question],
    ):
        assert prompt_of(loaded, *parts) == expected.get_prompt()
    between = prompt_of(loaded, text("one"), IMAGE, text(" "), text("two"))
    assert between.endswith("one <Img><ImageHere></Img> two###")


def test_an_image_with_blank_text_is_described(loaded):
    for parts in ([IMAGE], [text(""), IMAGE], [IMAGE, text(" \n")], [text(""), IMAGE, text("")]):
        assert prompt_of(loaded, *parts).endswith(f"</Img> {DEFAULT_QUESTION}###")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([{"type": "input_audio"}], r"content\.0: .*'input_audio' found"),
        ([{"type": "image", "source": {}}], r"content\.0: .*'image' found"),
        ([text("x"), IMAGE | {"image_url": "x"}], r"content\.1\.image_url\.image_url: .*object"),
        ([{"type": "text"}], r"content\.0\.text\.text: Field required"),
        (None, "content: expected text or a list of parts"),
        (5, "content: expected text or a list of parts"),
    ],
)
def test_the_part_that_is_wrong_is_named(content, says):
    with pytest.raises(ValueError, match=rf"^messages\.0\.{says}"):
        request({"role": "user", "content": content})


def test_an_answer_may_be_null(loaded):
    """As of an assistant that called a tool."""
    conv = request(USER, {"role": "assistant", "content": None}, USER).conversation(*loaded)
    assert conv.messages[1] == ["Assistant", ""]


@pytest.mark.parametrize("stop", [5, [1], {}])
def test_stop_strings_of_another_type(stop):
    with pytest.raises(ValueError, match=r"^stop"):
        request(stop=stop)


# fields without effect


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_logprobs", 0),
        ("functions", []),
        ("function_call", "none"),
        ("tool_choice", "auto"),
        ("parallel_tool_calls", False),
        ("min_p", 0),
        ("best_of", 1),
        ("length_penalty", 1.0),
        ("prompt_cache_retention", "24h"),
    ],
)
def test_a_field_that_changes_nothing_is_taken(field, value):
    assert request(**{field: value}).messages


@pytest.mark.parametrize(
    ("field", "value"),
    [("tool_choice", "required"), ("top_logprobs", 3), ("min_p", 0.1), ("best_of", 2)],
)
def test_a_field_that_would_change_the_answer_is_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field}: .* is not supported by this server"):
        request(**{field: value})
