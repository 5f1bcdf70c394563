"""The dialogue of page and terminal, without either: its answers are those of a new conversation."""

import asyncio
import gc
import re
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import pytest

from minigpt4.conversation.conversation import CONV_VISION
from minigpt4.serving.answers import Answers, Listener, in_thread
from minigpt4.serving.session import DEFAULT_QUESTION, MAX_IMAGES, Session, Sessions, Turn
from tests.conversation.conftest import chat, golden_model, vis_processor  # noqa: F401
from tests.small_release import picture

GREEDY = {"temperature": 0, "max_new_tokens": 12}


@pytest.fixture
def images(tmp_path):
    paths = [str(tmp_path / f"{seed}.png") for seed in range(2)]
    for seed, path in enumerate(paths):
        picture(seed).save(path)
    return paths


def ask(session, chat, turn, **settings):  # noqa: F811
    return "".join(session.stream(chat, CONV_VISION, turn, **{**GREEDY, **settings}))


def fresh(chat, *turns):  # noqa: F811
    """Return the last answer of a conversation made by the 2023 calls, without a cache."""
    conv, images = CONV_VISION.copy(), []
    for text, paths, answer in turns:
        for path in paths:
            chat.upload_img(path, conv, images)
        chat.ask(text, conv)
        if answer is not None:
            conv.append_message(conv.roles[1], answer)
    return chat.answer(conv, images, **GREEDY)[0]


def test_dialogue_retry_undo_and_edit_answer_as_a_fresh_conversation(chat, images):  # noqa: F811
    session, first, second = Session(), images[:1], images[1:]
    one = ask(session, chat, Turn("what is it?", tuple(first)))
    assert one == fresh(chat, ("what is it?", first, None)) != ""
    two = ask(session, chat, Turn("and this house", tuple(second)))
    assert two == fresh(chat, ("what is it?", first, one), ("and this house", second, None))
    assert ask(session, chat, session.edited(1, "and this house")) == two  # retry
    session.turns.pop()  # undo
    three = ask(session, chat, Turn("the colour of the tree"))
    assert three == fresh(chat, ("what is it?", first, one), ("the colour of the tree", [], None))
    four = ask(session, chat, session.edited(0, "why near a tree"))
    assert four == fresh(chat, ("why near a tree", first, None))
    assert [(turn.text, turn.answer) for turn in session.turns] == [("why near a tree", four)]


def test_a_refused_turn_leaves_the_dialogue_as_it_was(chat, images, tmp_path):  # noqa: F811
    session = Session()
    ask(session, chat, Turn("what is it?", tuple(images)))
    (tmp_path / "bad.png").write_text("no image")
    turns = list(session.turns)
    for turn, settings, says in [
        (Turn("x", (str(tmp_path / "bad.png"),)), {}, "expected an image"),
        (Turn("x", (str(tmp_path / "absent.png"),)), {}, "no file"),
        (Turn("x", (images[0],) * (MAX_IMAGES + 1)), {}, "9 images"),
        (Turn(" "), {}, "type a question"),
        (Turn("x"), {"temperature": -1}, "temperature: -1"),
        (Turn("x"), {"max_new_tokens": 10**6}, "leaves no room"),
    ]:
        with pytest.raises((ValueError, OSError), match=says):
            ask(session, chat, turn, **settings)
        assert session.turns == turns and not session.is_busy
    assert ask(session, chat, Turn("and now?"))


def test_an_image_without_words_is_described_and_text_is_made_fit(images):
    assert Turn("  ", tuple(images)).text == DEFAULT_QUESTION
    assert Turn("a\ud800b").text == "a?b"


def test_only_the_latest_sessions_stay_warm_and_old_ones_are_forgotten():
    kept, sessions = Sessions(warm=2, most=3), [Session(turns=[Turn("x")]) for _ in range(4)]
    caches = [session.cache for session in sessions]
    for session in (sessions[0], sessions[1], sessions[0], sessions[2]):
        kept.use(session)
    assert [session.cache is cache for session, cache in zip(sessions, caches, strict=True)][
        :3
    ] == [True, False, True]
    kept.use(sessions[3])  # the fourth of three at most
    assert [len(session.turns) for session in sessions] == [1, 0, 1, 1]
    kept.age_s = 0
    kept.forget_old()
    assert not any(session.turns for session in sessions)


def test_a_tab_finds_its_session_again_while_it_is_kept():
    kept = Sessions(most=1)
    one = kept.of(("", "tab 1"))
    kept.use(one)
    assert kept.of(("", "tab 1")) is one
    assert kept.of(("", "tab 2")) is not one and kept.of(("somebody else", "tab 1")) is not one
    kept.use(kept.of(("", "tab 3")))
    del one
    gc.collect()
    assert list(kept._by_key) == [("", "tab 3")]


def test_a_stopped_answer_ends_within_one_token(chat):  # noqa: F811
    """The reader leaves while a token is computed; no further token is begun."""
    begun = []

    def slow(ids, scores):  # a stopping criterion that never stops, called after each token
        begun.append(time.monotonic())
        time.sleep(0.05)
        return [False] * len(ids)

    executor, session, stop = ThreadPoolExecutor(1), Session(), threading.Event()
    slow_chat = type(chat)(chat.model, chat.vis_processor, stopping_criteria=[slow])
    settings = {**GREEDY, "max_new_tokens": 200, "stop_event": stop}
    pieces = session.stream(slow_chat, CONV_VISION, Turn("what is it?"), **settings)

    async def read_a_little():
        async with aclosing(in_thread(executor, lambda: deque(pieces, 0), stop)) as steps:
            async for _ in steps:
                if len(begun) >= 3:
                    break
        return time.monotonic()

    left = asyncio.run(read_a_little())
    executor.submit(int).result(timeout=5)  # the thread is free
    assert 3 <= len(begun) < 8, len(begun)
    assert sum(moment > left for moment in begun) <= 1
    assert not session.is_busy and session.turns[0].answer and session.turns[0].is_stopped
    executor.shutdown()


def test_an_edit_ends_the_answer_that_is_being_written(chat):  # noqa: F811
    session, stop = Session(), threading.Event()
    session.stop = stop
    settings = {**GREEDY, "max_new_tokens": 200, "stop_event": stop}
    first = Turn("what is it?")
    pieces = session.stream(chat, CONV_VISION, first, **settings)
    next(pieces)
    session.asked = first
    edited = session.edited(0, "why?")
    assert stop.is_set() and session.turns == [] and session.asked is None
    list(pieces)
    assert ask(session, chat, edited) == fresh(chat, ("why?", [], None))


def test_a_turn_that_is_stopped_before_its_answer_begins_is_not_asked(chat):  # noqa: F811
    session, stop = Session(), threading.Event()
    stop.set()
    assert ask(session, chat, Turn("what is it?"), stop_event=stop) == ""
    assert session.turns == [] and not session.is_busy


def test_visitors_do_not_see_the_folders_of_the_server(chat, tmp_path):  # noqa: F811
    """The page names files only; a person at the terminal reads the path as it was typed."""
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    answers = Answers(chat, CONV_VISION)

    async def answer(path):
        turn = Turn("x", (str(path),))
        pieces = answers.write(Session(), turn, GREEDY, Listener(lambda: True), print)
        async with aclosing(pieces) as steps:
            async for _ in steps:
                pass

    for path, says in [
        (bad, "image 'bad.png': .*expected an image"),
        (tmp_path / "absent.png", "no file 'absent.png'"),
        (tmp_path, "image '.*': a folder; expected an image"),
    ]:
        with pytest.raises(ValueError, match=says) as error:
            asyncio.run(answer(path))
        assert f"{tmp_path.parent}" not in str(error.value)
        with pytest.raises((ValueError, OSError), match=re.escape(f"'{path}'")):
            Turn("x", (str(path),)).encode(chat)
    answers.executor.shutdown()
