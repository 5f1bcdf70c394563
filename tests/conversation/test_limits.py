"""When an answer ends, what does not fit, and what is refused."""

import operator
import threading

import pytest

from minigpt4.conversation.chat import MAX_MESSAGE_CHARS, PrefixCache, Sampling
from minigpt4.conversation.conversation import CHATML, CONV_VISION, Chat, Conversation
from minigpt4.conversation.sampling import Request, request_of
from minigpt4.text.rows import IMAGE_ID
from tests.conversation.helpers import GREEDY, asked, computed

# stopping


def test_a_stop_event_ends_the_answer_at_once(chat, embeddings):
    stop, conv_images = threading.Event(), asked(chat, "what do you notice?", embeddings[:1])
    with computed(chat) as passes:
        stream = chat.stream_answer(
            *conv_images, stop_event=stop, temperature=0, max_new_tokens=100
        )
        first = next(stream)
        stop.set()
        done = len(passes)
        rest = list(stream)
    assert len(passes) == done  # not one token more
    assert conv_images[0].messages[-1] == ["Assistant", first + "".join(rest)]


def test_a_stop_event_from_another_thread(chat, embeddings):
    """The event is set while a token is computed: that token is the last."""
    stop = threading.Event()
    conv, images = asked(chat, "what do you notice?", embeddings[:1])
    handle = chat.model.llama_model.register_forward_hook(
        lambda *_: stop.set() if len(passes) == 3 else None
    )
    with computed(chat) as passes:
        _, ids = chat.answer(conv, images, stop_event=stop, temperature=0, max_new_tokens=100)
    handle.remove()
    assert len(passes) == 3 == len(ids)


def test_a_closed_stream_keeps_what_was_written_and_its_cache(chat, embeddings):
    cache = PrefixCache()
    conv, images = asked(chat, "what do you notice?", embeddings[:1])
    stream = chat.stream_answer(conv, images, cache=cache, temperature=0, max_new_tokens=100)
    with computed(chat) as passes:
        first = next(stream)
        stream.close()
    assert conv.messages[-1][1].startswith(first)
    chat.ask("go on", conv)
    wanted = chat.answer(conv.copy(), images, **GREEDY)[0]
    with computed(chat) as again:
        assert chat.answer(conv, images, cache=cache, **GREEDY)[0] == wanted
    assert again[0][1] < passes[0][1]


# limits and mistakes


def test_overflow_leaves_out_old_text_and_never_the_image(chat, embeddings):
    longest = chat.model.llama_model.config.max_position_embeddings
    conv, images, notices = CONV_VISION.copy(), [], []
    for turn in range(20):
        if turn in (0, 3):
            conv.append_image()
            images.append(embeddings[turn])
        chat.ask(f"question {turn}: what do you see in the image?", conv)
        before = conv.copy()
        with computed(chat) as passes:
            _, ids = chat.answer(conv, images, on_notice=notices.append, **GREEDY)
        assert passes[0][1] + GREEDY["max_new_tokens"] <= longest
        assert max(highest for _, _, highest in passes) < longest
        assert conv.messages[:-1] == before.messages  # what the person sees stays whole
        assert len(ids) >= 1
    assert notices and all("images stay" in notice for notice in notices)
    context = chat._context(before, images, Request(Sampling(**GREEDY), on_notice=notices.append))
    assert [id(image) for image in context.images] == [id(image) for image in images]
    assert context.ids.count(IMAGE_ID) == 2 * images[0].shape[1]


def test_a_text_that_is_far_too_long_is_not_tokenised(chat):
    """However it came into the dialogue: as a question, an answer or the system text."""
    huge, seen, tokenizer = "word and " * 2_000_000, [], chat.encoder.tokenizer

    class Counting(type(tokenizer)):
        def __call__(self, texts, **options):
            seen.append(sum(map(len, texts)))
            return super().__call__(texts, **options)

    tokenizer.__class__ = Counting
    try:
        conv, _ = asked(chat, "what is it?")
        conv.messages[0][1] = huge
        with pytest.raises(
            ValueError, match=r"question and images take [\d]+ tokens of \d+: shorten the question"
        ):
            chat.answer(conv, [], **GREEDY)
        conv.append_message(conv.roles[1], huge)
        chat.ask("and then?", conv)
        notices = []
        # the older ones are left out
        assert chat.answer(conv, [], on_notice=notices.append, **GREEDY)[1].size
        assert "the 1 oldest question(s) are left out" in notices[0]
        conv.system = huge
        chat.ask("why?", conv)
        with pytest.raises(ValueError, match="shorten the question"):
            chat.answer(conv, [], **GREEDY)
    finally:
        tokenizer.__class__ = Counting.__mro__[1]
    assert 0 < sum(seen) < 100_000


def test_the_callers_max_length_holds(chat, embeddings):
    conv, images = asked(chat, "Why?", embeddings[:1])
    length = chat.get_context_emb(conv, images).shape[1]
    notices = []
    for room in (5, 20):
        _, ids = chat.answer(
            conv.copy(),
            images,
            max_length=length + room,
            temperature=0,
            max_new_tokens=9,
            on_notice=notices.append,
        )
        assert len(ids) <= room
    assert len(notices) == 1
    with pytest.raises(
        ValueError, match=r"question and images take \d+ tokens of 30: shorten the question"
    ):
        chat.answer(conv, images, max_length=30, max_new_tokens=9)
    with pytest.raises(
        ValueError, match=r"max_new_tokens: 1000000000 leaves no room for a question in \d+ tokens"
    ):
        chat.answer(conv, images, max_new_tokens=10**9)
    assert conv.messages[-1][0] == "Human"


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("num_beams", 0),
        ("num_beams", 10**6),
        ("max_new_tokens", 0),
        ("repetition_penalty", float("inf")),
        ("max_length", 1),
        ("min_length", -5),
        ("seed", "x"),
        ("seed", 2**63),
        ("top_k", 2.5),
        ("num_beams", 1.5),
        ("max_new_tokens", float("inf")),
        ("do_sample", "no"),
    ],
)
def test_settings_out_of_range(chat, field, value):
    conv, _ = asked(chat, "hello")
    before = conv.copy()
    with pytest.raises(ValueError, match=f"^{field}: .*expected (a|True)"):
        chat.answer(conv, [], **{field: value})
    assert conv == before


def test_whole_numbers_of_a_slider_are_taken():
    assert (
        Sampling(top_k=50.0, max_new_tokens=300.0) == Sampling()
        and type(Sampling(top_k=2.0).top_k) is int
    )


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "the message is empty"),
        (" \n\t", "the message is empty"),
        (None, "the message is empty"),
        ("x" * 10**6, rf"has 1,000,000 characters; at most {MAX_MESSAGE_CHARS:,}"),
    ],
    ids=["nothing", "spaces", "None", "a million"],
)
def test_messages_that_are_refused(chat, text, message):
    conv, _ = asked(chat, "hello")
    before = conv.copy()
    with pytest.raises(ValueError, match=message):
        chat.ask(text, conv)
    assert conv == before


def test_odd_characters_are_answered(chat):
    for text in (
        "\ud800 lone surrogate",
        "\x00\x01",
        "\u202e right to left",
        "e" + "\u0301" * 200,
        "🏳️‍🌈",
    ):
        conv, _ = asked(chat, text)
        assert chat.answer(conv, [], temperature=0, max_new_tokens=2)[1].size


def test_there_must_be_a_question(chat, embeddings):
    conv = CONV_VISION.copy()
    with pytest.raises(ValueError, match=r"nothing to answer: .*ask\(text, conv\) first"):
        chat.answer(conv, [], **GREEDY)
    conv, images = asked(chat, "what?", embeddings[:1])
    chat.answer(conv, images, **GREEDY)
    with pytest.raises(ValueError, match="nothing to answer"):
        chat.stream_answer(conv, images, **GREEDY)
    chat.ask("why?", conv)
    with pytest.raises(ValueError, match=r"1 image slot\(s\), img_list 2"):
        chat.answer(conv, [*images, *images], **GREEDY)


def test_chatml_ends_at_its_end_token(chat):
    """The end token of a template is found by name; an unknown one is found as text."""
    conv = Conversation(CHATML)
    chat.ask("hello", conv)
    assert chat._context(conv, [], Request(Sampling(**GREEDY), print)).stop == ("<|im_end|>",)
    text, ids = chat.answer(conv, [], **GREEDY)
    assert len(ids) >= 1 and "<|im_end|>" not in text


# images beyond the context


def dialogue_of_images(chat, images, per_turn=1):
    """Return a conversation that shows images, `per_turn` with each question, and ends with a question."""
    conv = CONV_VISION.copy()
    for number in range(0, len(images), per_turn):
        for _ in images[number : number + per_turn]:
            conv.append_image()
        chat.ask(f"what is number {number}?", conv)
        conv.append_message(conv.roles[1], "A tree.")
    conv.messages.pop()
    return conv


def test_images_of_left_out_turns_go_when_they_alone_fill_the_context(chat, embeddings):
    longest, size = chat.longest, embeddings[0].shape[1]
    images = [embeddings[number % 4].clone() for number in range(longest // size + 3)]
    conv, notices = dialogue_of_images(chat, images), []
    request = Request(Sampling(**GREEDY), on_notice=notices.append)
    context = chat._context(conv, images, request)
    num_kept = len(context.images)
    assert 1 < num_kept < len(images)
    newest = images[-num_kept:]
    assert all(map(operator.is_, context.images, newest))
    assert context.ids.count(IMAGE_ID) == num_kept * size
    # the next older one would not have fitted
    assert len(context.ids) + GREEDY["max_new_tokens"] <= longest
    assert len(context.ids) + GREEDY["max_new_tokens"] + size + 8 > longest
    left_out = (
        f"{len(images) - 1} oldest question(s) are left out, and the {len(images) - num_kept}"
    )
    assert left_out in notices[0]


def test_images_stay_where_the_answer_only_becomes_shorter(chat, embeddings):
    """An image of nearly half of the context is no reason to answer without it."""
    image = embeddings[0].repeat(1, 40, 1)
    conv = dialogue_of_images(chat, [image, image])
    conv.messages = [*conv.messages[:-1], ["Human", "and why?"]]
    notices = []
    request = Request(Sampling(max_new_tokens=400, max_length=480), notices.append)
    context = chat._context(conv, [image], request)
    assert len(context.images) == 1 and "images stay" in notices[0] and len(notices) == 2


def test_too_many_images_of_one_question_are_named(chat, embeddings):
    images = [embeddings[0]] * 40
    conv = dialogue_of_images(chat, images, per_turn=40)
    with pytest.raises(ValueError, match=r"shorten the question or show fewer images \(40 take"):
        chat.answer(conv, images, **GREEDY)


def test_images_are_no_questions_and_stay_with_theirs(chat, embeddings):
    """Three images of one question, behind another question: one is left out, and the prompt is that of the rest."""
    rest = dialogue_of_images(chat, embeddings[:3], per_turn=3)
    conv = rest.copy()
    conv.messages[:0] = [["Human", "what " * 30], ["Assistant", "A tree."]]
    chat_length = len(chat._context(rest, list(embeddings[:3]), Request(Sampling(), print)).ids)
    notices = []
    settings = Sampling(max_new_tokens=9, max_length=chat_length + 9)
    context = chat._context(conv, list(embeddings[:3]), Request(settings, notices.append))
    assert "the 1 oldest question(s) are left out, images stay" in notices[0]
    assert len(context.ids) == chat_length
    single = dialogue_of_images(chat, embeddings[:2], per_turn=2)
    assert single.shortened(lambda conv: False) == (single, 0)


def test_a_chat_may_have_another_longest_dialogue(chat, embeddings):
    """Of the calls that give none: servers take the LLM's own limit."""
    conv, images = asked(chat, "Why?", embeddings[:1])
    request = request_of((), {}, (), chat.defaults)
    assert request.sampling.max_length == 2000
    own = Chat(chat.model, chat.vis_processor)
    own.max_length = 60
    assert own.longest == 60
    with pytest.raises(ValueError, match="leaves no room for a question in 60 tokens"):
        own.answer(conv, images, max_new_tokens=60)
    positional = (300, 1, 1, 0.9, 1.0, 1.0, 1.0, 500)  # 500: max_length
    assert request_of(positional, {}, (), own.defaults).sampling.max_length == 500


@pytest.mark.parametrize("temperature", [1e-7, 1e-40, 5e-324])
def test_a_tiny_temperature_is_greedy(chat, embeddings, temperature):
    conv, images = asked(chat, "Why?", embeddings[:1])
    wanted = chat.answer(conv.copy(), images, **GREEDY)[0]
    assert chat.answer(conv, images, **{**GREEDY, "temperature": temperature})[0] == wanted


def test_the_smallest_temperature_that_samples(chat, embeddings):
    conv, images = asked(chat, "Why?", embeddings[:1])
    assert chat.answer(conv, images, temperature=1e-6, max_new_tokens=4)[1].size
