"""Questions about images in batches: each answer equals that of the chat to the question alone."""

import re

import pytest

from minigpt4.conversation.conversation import CONV_VISION
from minigpt4.evaluation.answering import Item, answers
from tests.conversation.conftest import chat, golden_model, vis_processor  # noqa: F401
from tests.small_release import picture

GREEDY = {"temperature": 0, "max_new_tokens": 8}


def alone(chat, images, question):  # noqa: F811
    conv, embeds = CONV_VISION.copy(), []
    for image in images:
        chat.upload_img(image, conv, embeds)
    chat.ask(question, conv)
    return chat.answer(conv, embeds, **GREEDY)[0]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batched_answers_equal_single_ones(chat, tmp_path, batch_size):  # noqa: F811
    path = tmp_path / "a.png"
    picture(3).save(path)
    asked = [
        ((picture(0),), "what is it?"),
        ((picture(1), picture(2)), "which is the old wall"),
        ((), "who watched?"),
        ((path,), "and the water?"),
    ]
    items = [Item(str(number), *each) for number, each in enumerate(asked)]
    lines = list(answers(chat, CONV_VISION, items, batch_size=batch_size, **GREEDY))
    assert lines == [
        {"id": item.id, "answer": alone(chat, item.images, item.question)} for item in items
    ]
    assert len({line["answer"] for line in lines}) == len(items)


def test_a_sampled_answer_depends_on_the_seed_and_the_item_alone(chat):  # noqa: F811
    items = [Item(str(number), (picture(0),), "what is it?") for number in range(5)]

    def sampled(items, batch_size, seed=0):
        sampling = {"temperature": 1.0, "seed": seed, "max_new_tokens": 8}
        lines = answers(chat, CONV_VISION, items, batch_size=batch_size, **sampling)
        return {line["id"]: line["answer"] for line in lines}

    found = sampled(items, 1)
    assert len(set(found.values())) == 5  # the items do not share their random numbers
    assert sampled(items[::-1], 3) == sampled(items, 8) == found
    assert sampled(items[2:3], 1) == {"2": found["2"]}  # as for a call that resumes
    assert not set(sampled(items, 8, seed=1).items()) & set(found.items())


def test_a_bad_image_affects_only_its_own_item(chat, tmp_path):  # noqa: F811
    (tmp_path / "bad.png").write_text("no image")
    images = [
        (picture(0),),
        (picture(1), tmp_path / "bad.png"),
        (tmp_path / "absent.png",),
        (picture(2),),
    ]
    items = [Item(number, each, "what is it?") for number, each in enumerate(images)]
    lines = {line.pop("id"): line for line in answers(chat, CONV_VISION, items, **GREEDY)}
    for number in (0, 3):
        assert lines[number] == {"answer": alone(chat, images[number], "what is it?")}
    assert "image 'bad.png'" in lines[1]["error"].replace(f"{tmp_path}/", "")
    assert lines[2] == {"error": f"image: no file '{tmp_path / 'absent.png'}'"}


def test_a_question_that_the_chat_refuses_ends_the_program(chat):  # noqa: F811
    with pytest.raises(ValueError, match="type a question"):
        list(answers(chat, CONV_VISION, [Item("a", (picture(0),), " ")], **GREEDY))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_question_too_long_for_the_llm_affects_only_its_own_item(chat, batch_size):  # noqa: F811
    items = [
        Item(str(number), (), question)
        for number, question in enumerate(["hello", "x y " * 3000, "what ?"])
    ]
    lines = list(answers(chat, CONV_VISION, items, batch_size=batch_size, **GREEDY))
    assert re.fullmatch(
        r"question and images take \d+ tokens of 512: shorten the question", lines[1]["error"]
    )
    assert lines[::2] == list(
        answers(chat, CONV_VISION, items[::2], batch_size=batch_size, **GREEDY)
    )
