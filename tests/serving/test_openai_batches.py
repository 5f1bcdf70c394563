"""Waiting requests are answered in one batch, each as it would be alone."""

import asyncio
import base64
from contextlib import ExitStack

import httpx
import pytest

from minigpt4.serving import openai_app, openai_batches
from minigpt4.serving.guard import Hosts
from minigpt4.serving.limits import Refusal
from minigpt4.serving.openai_app import MOST_BYTES, OpenAI
from minigpt4.serving.openai_batches import Batches, Job, Pixels
from tests.small_release import jpeg_bytes, picture

SETTINGS = {"temperature": 0.0, "top_p": 0.9, "top_k": 50, "max_new_tokens": 24, "seed": None}
QUESTIONS = [
    "what is this?",
    "the old wall",
    "and the water?",
    "who watched the castle, and from where?",
]


@pytest.fixture
def sizes(loaded):
    """The rows of each pass through the LLM while the test runs, in order."""
    found = []
    head = loaded[0].model.llama_model.lm_head
    hook = head.register_forward_hook(lambda module, inputs, logits: found.append(len(logits)))
    yield found
    hook.remove()


@pytest.fixture
def batches(loaded):
    batches = Batches(loaded[0], batch_size=4)
    yield batches
    batches.close()


def job(loaded, question, image=None, **settings):
    """Return a job; `image` is the seed of one."""
    chat, empty = loaded
    conv, images = empty.copy(), []
    if image is not None:
        conv.append_image()
        images.append(Pixels(bytes([image]), chat.vis_processor(picture(image))))
    chat.ask(question, conv)
    return Job(conv, images, {**SETTINGS, **settings})


async def text_of(job):
    return "".join([piece async for piece in job.pieces()])


def answered(batches, make_jobs, leave=()):
    """Return jobs that come at once, and their texts; those of `leave` stop at their first piece."""

    async def run():
        jobs = make_jobs()
        batches.add(*jobs)

        async def listen(number):
            if number not in leave:
                return await text_of(jobs[number])
            async for _ in jobs[number].pieces():
                jobs[number].stop.set()
            return None

        return jobs, await asyncio.gather(*map(listen, range(len(jobs))))

    return asyncio.run(run())


def alone(loaded, question, image=None, **settings):
    chat, empty = loaded
    conv, images = empty.copy(), []
    if image is not None:
        chat.upload_img(picture(image), conv, images)
    chat.ask(question, conv)
    return chat.answer(conv, images, **{**SETTINGS, **settings})[0]


def test_those_that_wait_share_a_batch(loaded, batches, sizes):
    lengths = [24, 7, 24, 15]
    images = [None, 1, 1, 2]
    cases = list(zip(QUESTIONS, images, strict=True))
    _, texts = answered(
        batches,
        lambda: [
            job(loaded, *case, max_new_tokens=n) for case, n in zip(cases, lengths, strict=True)
        ],
    )
    assert sizes[0] == 4 and len(sizes) == 24  # as many passes as the longest answer has tokens
    assert texts == [
        alone(loaded, *case, max_new_tokens=n) for case, n in zip(cases, lengths, strict=True)
    ]


def test_who_leaves_is_computed_no_further(loaded, batches, sizes):
    jobs, texts = answered(
        batches,
        lambda: [
            job(loaded, question, max_new_tokens=400 if number == 1 else 24, repetition_penalty=1.3)
            for number, question in enumerate(QUESTIONS)
        ],
        leave=[1],
    )
    expected = [alone(loaded, question, repetition_penalty=1.3) for question in QUESTIONS]
    assert [texts[number] for number in (0, 2, 3)] == [expected[number] for number in (0, 2, 3)]
    assert len(jobs[1].answer.ids) < 400 and not jobs[1].is_complete


def test_other_settings_and_seeds_are_another_batch(loaded, batches, sizes):
    kinds = [{}, {"top_k": 5}, {"temperature": 1.0, "seed": 1}, {"temperature": 1.0, "seed": 1}]
    _, texts = answered(batches, lambda: [job(loaded, QUESTIONS[0], **kind) for kind in kinds])
    assert set(sizes) == {1}
    assert texts == [alone(loaded, QUESTIONS[0], **kind) for kind in kinds]


def test_one_that_is_refused_does_not_harm_its_batch(loaded, batches):
    async def run():
        good, bad = job(loaded, QUESTIONS[0]), job(loaded, "dog " * 4000)
        batches.add(good, bad)
        return await asyncio.gather(text_of(good), text_of(bad), return_exceptions=True)

    text, error = asyncio.run(run())
    assert text == alone(loaded, QUESTIONS[0]) and "shorten the question" in str(error)


def test_who_leaves_before_being_served_costs_nothing(loaded, batches, sizes):
    async def run():
        first, left = job(loaded, QUESTIONS[0]), job(loaded, QUESTIONS[1])
        left.stop.set()
        batches.add(left, first)
        return await text_of(first)

    assert asyncio.run(run()) == alone(loaded, QUESTIONS[0])
    assert set(sizes) == {1}


def test_prefixes_of_several_conversations_are_kept(loaded, batches):
    async def turns():
        found = []
        for seed in (3, 4, 5, 6, 3, 4, 5, 6, 7, 3):
            each = job(loaded, QUESTIONS[0], image=seed)
            batches.add(each)
            await text_of(each)
            found.append((each.num_cached, len(each.context.ids)))
        return found

    found = asyncio.run(turns())
    assert found[0][0] == 0
    for cached, num_prompt in found[4:8]:  # each conversation finds its own again
        assert cached == num_prompt - 1
    cached, num_prompt = found[9]  # a fifth one took the place of the oldest
    assert cached < num_prompt - 1


def test_the_embeddings_of_the_last_images_are_kept(loaded, batches, monkeypatch):
    monkeypatch.setattr(openai_batches, "MOST_EMBEDS", 2)
    encoded, encode = [], loaded[0].encode_images
    monkeypatch.setattr(
        loaded[0], "encode_images", lambda images: encoded.append(1) or encode(images)
    )
    for image, num_encoded in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        answered(batches, lambda image=image: [job(loaded, QUESTIONS[0], image, max_new_tokens=1)])
        assert len(encoded) == num_encoded


def test_large_requests_at_once_are_refused_before_they_are_read(loaded):
    api = OpenAI(*loaded, "tiny", Hosts("127.0.0.1"))
    with ExitStack() as rooms:
        for _ in range(9):  # 28 MiB each
            rooms.enter_context(api.room(MOST_BYTES))
        with pytest.raises(Refusal, match="too many large requests at once"), api.room(MOST_BYTES):
            pass
    with api.room(MOST_BYTES):
        api.batches.close()


def test_images_take_room_until_their_request_is_answered(loaded, monkeypatch):
    """A small file is decoded to as many pixels as a large one."""
    api = OpenAI(*loaded, "tiny", Hosts("127.0.0.1"))
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg_bytes(picture(1))).decode()
    num_bytes = loaded[0].vis_processor(picture(1)).nbytes

    async def statuses(*counts):
        transport = httpx.ASGITransport(api.asgi)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            found = []
            for count in counts:
                content = [{"type": "image_url", "image_url": {"url": url}}] * count
                request = {"model": "tiny", "max_tokens": 1}
                request["messages"] = [{"role": "user", "content": content}]
                reply = await client.post("/v1/chat/completions", json=request)
                found.append(reply.status_code)
            return found

    monkeypatch.setattr(openai_app, "MOST_BYTES_ALL", 4 * num_bytes)
    assert asyncio.run(statuses(3, 5, 3)) == [200, 429, 200]
    assert api._num_bytes == 0
    api.batches.close()


def test_images_of_a_question_that_does_not_fit_are_not_encoded(loaded, batches, monkeypatch):
    encoded, encode = [], loaded[0].encode_images
    monkeypatch.setattr(
        loaded[0], "encode_images", lambda images: encoded.append(1) or encode(images)
    )

    async def run():
        too_long = job(loaded, "dog " * 4000, image=1)
        batches.add(too_long)
        with pytest.raises(ValueError, match="shorten the question"):
            await text_of(too_long)

    asyncio.run(run())
    assert encoded == []


def test_a_long_answer_takes_the_room_that_is_left_and_leaves_out_no_turn(loaded, batches):
    async def run():
        each = job(loaded, "dog " * 300, max_new_tokens=10**9)
        each.conv.append_message(each.conv.roles[1], "A dog.")
        loaded[0].ask("what is it?", each.conv)
        assert batches._prepare(each)
        return each

    each = asyncio.run(run())
    assert each.context.max_new_tokens == 2000 - len(each.context.ids) > 300
    assert each.notices == []
