"""Decoding: KV caches updated in place, steps over fixed buffers, and what is left when an answer ends."""

import copy
import gc
import os
import random
import threading
import warnings

import psutil
import pytest
import torch

from minigpt4.conversation.chat import Chat, PrefixCache
from minigpt4.conversation.conversation import CONV_VISION
from minigpt4.models.llm.decoding import (
    CHUNK,
    MOST_STATIC,
    Decoder,
    InPlaceLayer,
    StaticSteps,
    cache_name,
    new_past,
)
from tests.conversation.helpers import GREEDY, asked, computed, sentence
from tests.small_release import picture


@pytest.fixture(scope="module", params=["eager", "sdpa", "grouped heads"])
def llm(request):
    """A small random LLM, in the attention kernels of CPU and GPU, and with fewer heads for keys than for queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if request.param == "grouped heads" else 4,
    }
    attention = "eager" if request.param == "eager" else "sdpa"
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, vocab_size=300, **heads
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_keys_and_values_in_place_are_those_of_transformers(llm):
    """Reading, growing past the buffers, cropping and reading on; nothing moves where there is room."""
    from transformers import DynamicCache

    draw = random.Random(0)
    own, theirs = new_past(llm), DynamicCache(config=llm.config)
    assert all(isinstance(layer, InPlaceLayer) for layer in own.layers)
    addresses = []
    for _ in range(60):
        held = own.get_seq_length()
        if held > 20 and draw.random() < 0.3:
            for past in (own, theirs):
                past.crop(-draw.randint(1, 15) if past is own else own.get_seq_length() - held)
        ids = torch.randint(300, (1, draw.choice([1, 1, 1, 30])))
        logits = [
            llm(input_ids=ids, **{cache_name(llm): past}, use_cache=True).logits
            for past in (own, theirs)
        ]
        # the kernels get the same numbers in other strides; measured 2e-6
        torch.testing.assert_close(*logits, atol=2e-5, rtol=0)
        assert own.get_seq_length() == theirs.get_seq_length()
        torch.testing.assert_close(own.layers[2].keys, theirs.layers[2].keys, atol=2e-5, rtol=0)
        addresses.append(own.layers[0].keys.data_ptr())
    assert own.get_seq_length() > CHUNK
    assert len(set(addresses)) <= -(-own.get_seq_length() // CHUNK) + 2


def test_a_chat_uses_nothing_deprecated(chat, embeddings):
    """Reading, steps of both kinds, beams, and an answer with a cache, with the warnings of libraries as errors."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("error", category)
        for static in (False, True):
            other = Chat(chat.model, chat.vis_processor)
            other.decoder = Decoder(chat.model.llama_model, static=static)
            conv, images = asked(other, "what is it?", embeddings[:1])
            assert len(other.answer(conv, images, cache=PrefixCache(), **GREEDY)[1])
        other.ask("why?", conv)
        assert len(other.answer(conv, images, num_beams=2, **GREEDY)[1])


def test_an_llm_whose_cache_stays_empty_is_refused(llm):
    """A model that lets the cache fall under the table, and one that has no argument for it."""

    class Forgetful(torch.nn.Module):
        config, get_input_embeddings = llm.config, llm.get_input_embeddings

        def forward(self, past_key_values=None, **kwargs):
            return llm(**kwargs)

    decoder = Decoder(Forgetful(), static=False)
    assert decoder.cache_name == "past_key_values"  # the name before transformers 5.24
    embeds = llm.get_input_embeddings()(torch.tensor([[1, 2, 3]]))
    with pytest.raises(
        ValueError,
        match=r"Forgetful was given 3 positions, its keys and values then have 0, expected 3",
    ):
        decoder.prefill(decoder.new_past(), embeds, torch.arange(3)[None], None)
    Forgetful.forward = lambda self, inputs_embeds: None
    with pytest.raises(
        ValueError,
        match=r"keys and values as cache or past_key_values; Forgetful.forward takes inputs_",
    ):
        Decoder(Forgetful())


class Wrapper(torch.nn.Module):
    """What peft and others put around a model: it names no argument, and `losing` passes without a cache on."""

    def __init__(self, model, losing=()):
        super().__init__()
        self.config, self.get_input_embeddings = model.config, model.get_input_embeddings
        self.inner, self.losing, self.passes = model, losing, 0

    def forward(self, *args, **kwargs):
        self.passes += 1
        if self.passes in self.losing:
            kwargs[cache_name(self.inner)] = None
        return self.inner(*args, **kwargs)


def written(llm, count=6):
    """Return the tokens that a greedy decoder writes."""
    decoder, past = Decoder(llm, static=False), new_past(llm)
    ids = torch.tensor([[1, 2, 3]])
    logits = decoder.prefill(past, llm.get_input_embeddings()(ids), torch.arange(3)[None], None)
    found = []
    with torch.no_grad(), decoder.steps(past, 1, 3 + count) as step:
        for index in range(count):
            found.append(int(logits.argmax(-1)))
            logits = step(logits.argmax(-1), torch.tensor([[3 + index]]), None)
    return found


def test_a_wrapped_llm_writes_what_it_writes_alone(llm):
    assert written(Wrapper(Wrapper(llm))) == written(llm)
    for losing, count in (((1,), 3), ((3,), 1)):  # at the prompt, at a later step
        with pytest.raises(
            ValueError, match=rf"Wrapper was given {count} positions, its keys and values then have"
        ):
            written(Wrapper(llm, losing))
    nothing = Wrapper(llm)
    nothing.inner = torch.nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match=r"as cache or past_key_values; Wrapper\.forward takes args, kwargs"
    ):
        Decoder(nothing)


@torch.no_grad()
def test_static_steps_equal_plain_steps(llm):
    static, plain = Decoder(llm, static=True), Decoder(llm, static=False)
    assert static.static and not plain.static
    for length in (7, 300, 510):  # the last answer needs larger buffers
        embeds = llm.get_input_embeddings()(torch.randint(300, (1, length)))
        positions = torch.arange(length)[None]
        pasts, found = [], []
        for decoder in (static, plain):
            past, rows = decoder.new_past(), []
            logits = decoder.prefill(past, embeds, positions, None)
            with decoder.steps(past, 1, length + 20) as step:
                for index in range(20):
                    rows.append(logits.clone())
                    logits = step(logits.argmax(-1), torch.tensor([[length + index]]), None)
            pasts.append(past)
            found.append(torch.cat(rows))
        # masked positions add exact zeros, sums have another length; measured 1e-6
        torch.testing.assert_close(*found, atol=1e-5, rtol=0)
        assert torch.equal(found[0].argmax(-1), found[1].argmax(-1))
        assert pasts[0].get_seq_length() == pasts[1].get_seq_length() == length + 20
        for mine, theirs in zip(pasts[0].layers, pasts[1].layers, strict=True):
            torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-5, rtol=0)
            torch.testing.assert_close(mine.values, theirs.values, atol=1e-5, rtol=0)
    assert static._steps.size == 1024
    with static.steps(past, 1, MOST_STATIC + 1):  # too long to reserve memory for
        assert static._steps.size == 1024


@pytest.fixture
def static_chat(chat):
    other = Chat(chat.model, chat.vis_processor)
    other.decoder = Decoder(chat.model.llama_model, static=True)
    return other


def test_static_chats_give_the_plain_answers(chat, static_chat, embeddings):
    """Turns with a prefix cache, sampling, a stop string, and the next session in the same buffers."""
    for seed in range(3):
        draw, cache = random.Random(seed), PrefixCache()
        conv, images = asked(chat, sentence(draw), embeddings[seed : seed + 1])
        for sampling in (GREEDY, {"max_new_tokens": 30, "seed": seed}, GREEDY):
            wanted = chat.answer(conv.copy(), images, **sampling)
            found = static_chat.answer(conv, images, cache=cache, **sampling)
            assert (found[0], found[1].tolist()) == (wanted[0], wanted[1].tolist())
            static_chat.ask(sentence(draw), conv)
    assert isinstance(static_chat.decoder._steps, StaticSteps)


def test_two_static_streams_do_not_mix(chat, static_chat, embeddings):
    """The second of two answers at once has no fixed buffers to itself and takes the plain steps."""
    rows = [
        asked(chat, text, [image])
        for text, image in zip(("what is it?", "why?"), embeddings, strict=False)
    ]
    wanted = [chat.answer(conv.copy(), images, **GREEDY)[0] for conv, images in rows]
    streams = [
        static_chat.stream_answer(conv, images, cache=PrefixCache(), **GREEDY)
        for conv, images in rows
    ]
    texts = ["", ""]
    for _ in range(GREEDY["max_new_tokens"] + 1):
        for index, stream in enumerate(streams):
            texts[index] += next(stream, "")
    assert texts == wanted
    assert not static_chat.decoder._lock.locked()


def test_a_closed_static_stream_keeps_its_cache(chat, static_chat, embeddings):
    cache = PrefixCache()
    conv, images = asked(chat, "what do you notice?", embeddings[:1])
    stream = static_chat.stream_answer(conv, images, cache=cache, temperature=0, max_new_tokens=100)
    with computed(static_chat) as passes:
        next(stream)
        stream.close()
    static_chat.ask("go on", conv)
    wanted = chat.answer(conv.copy(), images, **GREEDY)[0]
    with computed(static_chat) as again:
        assert static_chat.answer(conv, images, cache=cache, **GREEDY)[0] == wanted
    assert again[0][1] < passes[0][1]


def test_a_sliding_window_has_transformers_own_cache(embeddings, chat):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=900, sliding_window=16
    )
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 4, 16
    torch.manual_seed(0)
    model = copy.copy(chat.model)
    model._modules = {**chat.model._modules, "llama_model": MistralForCausalLM(config).eval()}
    other = Chat(model, chat.vis_processor)
    other.decoder = Decoder(model.llama_model, static=True)
    assert not other.decoder.static
    cache = PrefixCache()
    conv, images = asked(other, "what is it?", embeddings[:1])
    for _ in range(3):
        wanted = other.answer(conv.copy(), images, **GREEDY)[0]
        assert other.answer(conv, images, cache=cache, **GREEDY)[0] == wanted
        other.ask("why?", conv)


# what is left when an answer ends


@pytest.mark.parametrize("how", ["stop event", "closed"])
def test_the_thread_of_a_stopped_answer_is_gone_within_a_token(chat, embeddings, how):
    stop, running = threading.Event(), threading.Event()
    conv, images = asked(chat, "what do you notice?", embeddings[:1])
    options = {
        "min_length": 400,
        "max_new_tokens": 400,
        "max_length": 512,
        "temperature": 1.0,
        "seed": 1,
    }

    def read():
        stream = chat.stream_answer(
            conv, images, stop_event=stop if how == "stop event" else None, **options
        )
        for _ in stream:
            running.set()
            if how == "closed" and stop.is_set():
                stream.close()

    before = set(threading.enumerate())
    thread = threading.Thread(target=read)
    with computed(chat) as passes:
        thread.start()
        assert running.wait(60)
        stop.set()
        done = len(passes)
        thread.join(60)
        assert not thread.is_alive()
    assert len(passes) <= done + 1
    assert len(passes) < 300  # it had much left to write
    assert set(threading.enumerate()) == before
    assert conv.messages[-1][0] == "Assistant"


def layers_in_memory():
    gc.collect()
    return {id(thing) for thing in gc.get_objects() if type(thing) is InPlaceLayer}


def test_fifty_chats_leave_no_memory_behind(chat):
    """Whole sessions: upload, three turns, one stopped. Every key and value is freed with its session."""
    process, resident = psutil.Process(os.getpid()), []
    earlier = layers_in_memory()  # of chats that other tests still hold
    for number in range(60):
        conv, images, cache = CONV_VISION.copy(), [], PrefixCache()
        chat.upload_img(picture(number), conv, images)
        for turn in range(3):
            chat.ask("what do you see in the image? " * 3, conv)
            stream = chat.stream_answer(conv, images, cache=cache, seed=turn, max_new_tokens=20)
            if turn == 2:
                next(stream)
                stream.close()
            else:
                assert list(stream)
        resident.append(process.memory_info().rss)
    del conv, images, cache, stream
    assert layers_in_memory() <= earlier
    settled = resident[10:]  # the first ten warm allocators and lazy imports
    print(f"resident: {settled[0] / 2**20:.0f} MiB, then at most {max(settled) / 2**20:.0f} MiB")
    assert max(settled) < 1.05 * settled[0]
