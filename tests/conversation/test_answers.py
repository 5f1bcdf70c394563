"""Answers: streaming, batches, and the KV cache that is kept between turns."""

import copy
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from minigpt4.common.device import shared_generators
from minigpt4.conversation.answer_text import AnswerText
from minigpt4.conversation.chat import Chat, PrefixCache
from minigpt4.conversation.context import Context
from minigpt4.conversation.conversation import CONV_VISION, VICUNA_V1, Conversation, template_for
from minigpt4.conversation.generation import MOST_OPEN, padded_batch
from minigpt4.conversation.sampling import draw as draw_tokens
from minigpt4.models.llm import layouts
from minigpt4.models.llm.decoding import Decoder
from tests.conversation.helpers import GREEDY, asked, computed, sentence

# one answer and its stream


@pytest.mark.parametrize(
    "sampling", [GREEDY, {"max_new_tokens": 40, "seed": 3}, {**GREEDY, "num_beams": 3}], ids=str
)
def test_stream_joins_to_the_answer(chat, embeddings, sampling):
    draw = random.Random(1)
    for _ in range(4):
        conv, images = asked(chat, sentence(draw), embeddings[:1])
        streamed = conv.copy()
        text, ids = chat.answer(conv, images, **sampling)
        pieces = list(chat.stream_answer(streamed, images, **sampling))
        assert "".join(pieces) == text == conv.messages[-1][1]
        assert all(pieces) and streamed == conv
        assert 1 <= len(ids) <= sampling["max_new_tokens"]


def test_a_stream_never_shows_half_a_character_or_a_stop_string(chat):
    tokenizer, text = chat.model.llama_tokenizer, "café 🙂 and # one ## two\n### gone"
    answer = AnswerText(tokenizer, ("###",))
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    shown = [answer.safe(ids[:count]) for count in range(len(ids) + 1)]
    assert answer.whole(ids) == shown[-1] == "café 🙂 and # one ## two"
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))
    assert not any("\ufffd" in piece for piece in shown)


def test_a_long_stream_decodes_each_token_a_fixed_number_of_times(chat):
    tokenizer, decoded = copy.copy(chat.model.llama_tokenizer), []

    def decode(ids, **options):
        decoded.append(len(ids))
        return type(tokenizer).decode(tokenizer, ids, **options)

    text = " ".join(f"word{number} café 🙂🙂" for number in range(60))
    ids = tokenizer(text, add_special_tokens=False).input_ids
    answer = AnswerText(tokenizer, ("###",))
    tokenizer.decode = decode
    shown = [answer.safe(ids[:count]) for count in range(len(ids) + 1)]
    assert len(ids) > 20 * AnswerText.WINDOW and shown[-1] == text
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))
    assert sum(decoded) < 4 * AnswerText.WINDOW * len(ids)


def test_sampling_is_seeded_and_temperature_zero_is_greedy(chat, embeddings):
    conv, images = asked(chat, "what is it?", embeddings[:1])

    def draw(**sampling):
        return chat.answer(conv.copy(), images, max_new_tokens=30, **sampling)[1].tolist()

    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are touched
    assert (
        draw(temperature=0)
        == draw(do_sample=False)
        == draw(top_k=1, seed=5)
        == draw(top_p=1e-6, seed=5)
    )
    assert draw(temperature=2, seed=1) == draw(temperature=2.0, seed=1)


def test_an_answer_without_a_seed_draws_from_a_generator_of_its_own(chat, embeddings):
    """Also while another thread records its steps on a GPU and nobody may draw from torch's own generators."""
    conv, images = asked(chat, "what is it?", embeddings[:1])
    found = []
    with shared_generators:
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            found.append(chat.answer(conv.copy(), images, max_new_tokens=30)[1].tolist())
    assert found[0] == found[1] != found[2]  # runs that begin alike stay alike


def test_two_threads_answer_at_once(chat, embeddings):
    """One over fixed buffers, one by plain steps; neither draws from torch's own generators."""
    chats = [Chat(chat.model, chat.vis_processor) for _ in range(2)]
    chats[0].decoder = Decoder(chat.model.llama_model, static=True)
    conv, images = asked(chat, "what is it?", embeddings[:1])

    def answer(own, seed):
        return own.answer(conv.copy(), images, max_new_tokens=30, seed=seed)[1].tolist()

    wanted = [answer(chat, seed) for seed in range(6)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(answer, [chats[0], chats[1]] * 3, range(6)))
    assert found == wanted


def test_answers_in_bfloat16(chat, embeddings):
    model = copy.deepcopy(chat.model)
    model.llama_model.to(torch.bfloat16)
    half = Chat(model, chat.vis_processor)
    conv, images = asked(half, "what is it?", embeddings[:1])
    _, ids = half.answer(conv.copy(), images, **GREEDY)
    assert len(ids) >= 1
    rows = [asked(half, question, embeddings[:1]) for question in ("what is it?", "why is it so?")]
    assert len(half.answer_batch([row[0] for row in rows], [row[1] for row in rows], **GREEDY)) == 2


@pytest.mark.parametrize("prompt_template", ["[INST] {} [/INST] ", "Question: {} Answer:", "{}\n"])
def test_a_chat_opens_as_training_does(chat, embeddings, prompt_template):
    """The same embeddings, bit by bit, as the model's own prompt around an image (templates without system text)."""
    conv, image = Conversation(replace(template_for(prompt_template), system="")), embeddings[0]
    conv.append_image()
    chat.ask("Describe it.", conv)
    conv.append_message(conv.roles[1], None)
    prompt = prompt_template.format("<Img><ImageHere></Img> Describe it.")
    chat.model.prompt_list = [prompt]
    (row,) = chat.model.rows({"text_input": [""]})
    chat.model.prompt_list = []
    trained = layouts.embed(
        chat.model.llama_model.get_input_embeddings(), row.ids[: row.num_prompt], image[0]
    )
    assert torch.equal(chat.get_context_emb(conv, [image])[0], trained)


# batches


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"seed": 7}], ids=str)
@pytest.mark.parametrize("seed", range(5))
def test_batch_answers_equal_single_answers(chat, embeddings, seed, sampling):
    draw = random.Random(seed)
    rows = [
        asked(chat, sentence(draw, 30), draw.sample(embeddings, draw.randint(0, 2)))
        for _ in range(5)
    ]
    budgets = {"max_new_tokens": draw.choice([1, 7, 25]), **sampling}
    single = [chat.answer(conv.copy(), images, **budgets) for conv, images in rows]
    convs = [conv for conv, _ in rows]
    batch = chat.answer_batch(convs, [images for _, images in rows], **budgets)
    assert [(text, ids.tolist()) for text, ids in batch] == [
        (text, ids.tolist()) for text, ids in single
    ]
    assert [conv.messages[-1][1] for conv in convs] == [text for text, _ in single]


@pytest.mark.parametrize("num_beams", [1, 2])
def test_each_row_of_a_batch_may_have_a_seed_of_its_own(chat, embeddings, num_beams):
    rows = [asked(chat, "what is it?", embeddings[:1]) for _ in range(3)]
    sampling = {"max_new_tokens": 12, "num_beams": num_beams}
    single = [
        chat.answer(conv.copy(), images, seed=seed, **sampling)[1].tolist()
        for seed, (conv, images) in enumerate(rows)
    ]
    convs, images = [conv for conv, _ in rows], [images for _, images in rows]
    batch = chat.answer_batch(convs, images, seeds=range(3), **sampling)
    assert [ids.tolist() for _, ids in batch] == single
    assert len(set(map(tuple, single))) == 3


def test_drawing_is_that_of_torch():
    logits = torch.randn(3, 1001, generator=torch.Generator().manual_seed(0))
    theirs = [torch.Generator().manual_seed(seed) for seed in range(3)]
    ours = [torch.Generator().manual_seed(seed) for seed in range(3)]
    for _ in range(20):
        single = [
            torch.multinomial(row.softmax(-1), 1, generator=generator).item()
            for row, generator in zip(logits, theirs, strict=True)
        ]
        assert draw_tokens(logits, ours).tolist() == single
    logits[1, 5] = torch.nan
    assert draw_tokens(logits, ours)[1] == -1


def test_logits_that_are_not_numbers(chat, monkeypatch):
    output = chat.model.llama_model.get_output_embeddings().weight
    monkeypatch.setattr(output, "data", torch.full_like(output, torch.nan))
    for temperature in (0.0, 1.0):
        with pytest.raises(RuntimeError, match="logits are not numbers"):
            chat.answer(*asked(chat, "why?"), temperature=temperature)


def test_rows_that_have_ended_are_computed_no_further(chat, embeddings):
    """Each answer ends at its own first token that is divisible by seven; the others go on unchanged."""
    ending = Chat(
        chat.model, chat.vis_processor, stopping_criteria=[lambda ids, scores: ids[:, -1] % 7 == 0]
    )
    draw = random.Random(3)
    rows = [
        asked(chat, sentence(draw, 30), draw.sample(embeddings, draw.randint(0, 2)))
        for _ in range(8)
    ]
    settings = {"temperature": 0, "max_new_tokens": 40}
    single = [ending.answer(conv.copy(), images, **settings) for conv, images in rows]
    with computed(chat) as passes:
        batch = ending.answer_batch(
            [conv for conv, _ in rows], [images for _, images in rows], **settings
        )
    assert [(text, ids.tolist()) for text, ids in batch] == [
        (text, ids.tolist()) for text, ids in single
    ]
    assert len({len(ids) for _, ids in batch}) > 2
    longest_first = sorted((len(ids) for _, ids in batch), reverse=True)
    for step, (size, *_) in enumerate(passes):
        still_open = sum(length > step for length in longest_first)
        assert still_open <= size < still_open / MOST_OPEN or (step == 0 and size == len(rows))


def test_rows_of_a_batch_keep_their_own_positions(chat):
    """Rotary positions are relative and forgive a shift; learned ones do not."""
    contexts = [Context(tuple(range(3, 3 + length)), (), (), 1) for length in (2, 5)]
    embeds, mask, positions = padded_batch(chat.model.llama_model, contexts, 0)
    assert mask.tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]
    assert [row[kept].tolist() for row, kept in zip(positions, mask.bool(), strict=True)] == [
        [0, 1],
        [0, 1, 2, 3, 4],
    ]
    assert torch.equal(embeds[0, 3:], embeds[1, :2])
    assert padded_batch(chat.model.llama_model, contexts[1:], 2)[2].tolist() == [[2, 3, 4]]


def test_a_batch_has_one_template(chat):
    convs = [CONV_VISION.copy(), Conversation(VICUNA_V1)]
    for conv in convs:
        chat.ask("hello", conv)
    with pytest.raises(ValueError, match="different templates"):
        chat.answer_batch(convs, [[], []], **GREEDY)


def test_two_interleaved_streams_do_not_mix(chat, embeddings):
    rows = [
        asked(chat, text, [image])
        for text, image in (("what is it?", embeddings[0]), ("why?", embeddings[1]))
    ]
    wanted = [chat.answer(conv.copy(), images, **GREEDY)[0] for conv, images in rows]
    streams = [
        chat.stream_answer(conv, images, cache=PrefixCache(), **GREEDY) for conv, images in rows
    ]
    texts = ["", ""]
    for _ in range(GREEDY["max_new_tokens"] + 1):
        for index, stream in enumerate(streams):
            texts[index] += next(stream, "")
    assert texts == wanted


# the KV cache of earlier turns


@pytest.mark.parametrize("seed", range(4))
def test_prefix_cache_changes_nothing_but_the_work(chat, embeddings, seed):
    """Turns, retries, edited questions, new images and other images in the same slot, against a full prefill."""
    draw, cache = random.Random(seed), PrefixCache()
    conv, images = CONV_VISION.copy(), []
    work = {"cached": 0, "full": 0}
    for turn in range(7):
        before = conv.copy()
        if turn == 0 or draw.random() < 0.3:
            conv.append_image()
            images.append(draw.choice(embeddings))
        elif draw.random() < 0.3:
            images[0] = draw.choice(embeddings)
        chat.ask(sentence(draw, 6), conv)
        plain = conv.copy()
        with computed(chat) as passes:
            text, ids = chat.answer(conv, images, cache=cache, temperature=0, max_new_tokens=8)
        work["cached"] += sum(positions for _, positions, _ in passes)
        with computed(chat) as passes:
            wanted, wanted_ids = chat.answer(plain, images, temperature=0, max_new_tokens=8)
        work["full"] += sum(positions for _, positions, _ in passes)
        assert (text, ids.tolist()) == (wanted, wanted_ids.tolist())
        if draw.random() < 0.3:  # retry or edit: the turn is taken back
            conv = before
            images = images[: conv.num_images]
            if not conv.num_images:
                conv.append_image()
                images = [embeddings[0]]
    assert work["cached"] < work["full"] / 2


def test_a_later_turn_computes_only_what_is_new(chat, embeddings):
    cache = PrefixCache()
    conv, images = asked(chat, "what is it?", embeddings[:1])
    chat.answer(conv, images, cache=cache, **GREEDY)
    chat.ask("Why?", conv)
    new = conv.get_prompt().split("what is it?")[1] + "Assistant:"
    with computed(chat) as passes:
        chat.answer(conv, images, cache=cache, **GREEDY)
    assert passes[0][1] <= len(chat.model.llama_tokenizer(new).input_ids)
    copied = [image.clone() for image in images]  # equal numbers, another image: identity decides
    chat.ask("Why?", conv)
    with computed(chat) as passes:
        chat.answer(conv, copied, cache=cache, **GREEDY)
    assert passes[0][1] > copied[0].shape[1] + len(chat.model.llama_tokenizer(new).input_ids)


@pytest.mark.parametrize("fail_at", [1, 2])
def test_errors_reach_the_reader_and_leave_the_conversation(chat, embeddings, fail_at):
    cache = PrefixCache()
    conv, images = asked(chat, "what is it?", embeddings[:1])
    chat.answer(conv, images, cache=cache, **GREEDY)
    chat.ask("Why?", conv)
    before, wanted = conv.copy(), chat.answer(conv.copy(), images, **GREEDY)[0]
    for call in (chat.answer, lambda *args, **kwargs: list(chat.stream_answer(*args, **kwargs))):
        with computed(chat, fail_at), pytest.raises(RuntimeError, match="out of memory"):
            call(conv, images, cache=cache, **GREEDY)
        assert conv == before
        assert chat.answer(conv.copy(), images, cache=cache, **GREEDY)[0] == wanted
