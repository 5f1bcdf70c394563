"""The API for programs: gradio_client against the running server, and arguments of every kind, passed directly."""

import time
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4.conversation.chat import Sampling
from minigpt4.serving.answers import PATIENCE_S, SETTINGS, checked
from minigpt4.serving.session import DEFAULT_QUESTION, Turn
from tests.serving.server import CONTROLS, Visitor, is_idle, wait_until
from tests.small_release import picture

SHORT = {"temperature": 0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def client(server):
    gradio_client = pytest.importorskip("gradio_client")
    return gradio_client.Client(server.url, verbose=False)


@pytest.fixture
def images(tmp_path):
    from gradio_client import handle_file

    for seed in range(2):
        picture(seed).save(tmp_path / f"{seed}.png")
    return [handle_file(str(tmp_path / f"{seed}.png")) for seed in range(2)]


def test_there_is_one_call_with_named_parameters(client):
    described = client.view_api(return_format="dict")
    assert list(described["named_endpoints"]) == ["/chat"] and not described["unnamed_endpoints"]
    parameters = described["named_endpoints"]["/chat"]["parameters"]
    names = [parameter["parameter_name"] for parameter in parameters]
    assert names == ["question", "images", *SETTINGS]
    required = [
        parameter["parameter_name"]
        for parameter in parameters
        if not parameter["parameter_has_default"]
    ]
    assert required == ["question"]


def test_a_call_answers_as_the_page_does(client, server, images, tmp_path):
    visitor = Visitor(server)
    shown = [
        visitor.upload(f"{seed}.png", (tmp_path / f"{seed}.png").read_bytes()) for seed in range(2)
    ]
    on_page = visitor.chat("what is this?", *shown, max_new_tokens=12)[1][1]
    called = client.predict("what is this?", images, **SHORT, api_name="/chat")
    assert " ".join(called.split()) == " ".join(on_page.split()) != ""
    assert called == client.predict(
        question="what is this?", images=images, **SHORT, api_name="/chat"
    )
    assert called != client.predict("what is this?", images[:1], **SHORT, api_name="/chat")
    assert client.predict("", images[:1], **SHORT) == client.predict(
        DEFAULT_QUESTION, images[:1], **SHORT
    )
    assert client.predict("hello", max_new_tokens=4) and client.predict(
        "hello", images[0], seed=1, **SHORT
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"question": ""}, "type a question"),
        ({"question": 5}, "question: int; expected text"),
        ({"question": ["x"]}, "question: list; expected text"),
        ({"question": "x" * 40_000}, "40,000 characters; at most 32,768"),
        ({"images": "/etc/passwd"}, "images: expected a list of gradio_client.handle_file"),
        ({"images": [{"path": "/etc/passwd"}]}, "images: expected a list"),
        ({"images": [[[]]]}, "images: expected a list"),
        ({"temperature": "hot"}, "temperature: 'hot'; expected a number from 0 to 2"),
        ({"temperature": float("nan")}, "temperature: 'nan'; expected"),
        ({"temperature": float("inf")}, "temperature: 'inf'; expected"),
        ({"temperature": True}, "temperature: 'True'; expected"),
        ({"temperature": [0.5]}, "temperature: .*; expected"),
        (
            {"max_new_tokens": 10**9},
            "max_new_tokens: '1000000000'; expected a number from 1 to 1000",
        ),
        ({"max_new_tokens": 1.5}, "max_new_tokens: 1.5; expected a whole number"),
        ({"num_beams": 1000}, "num_beams: '1000'; expected a number from 1 to 10"),
        ({"seed": 10**30}, "seed: .*; expected"),
        ({"top_k": None}, "top_k: 'None'; expected"),
    ],
)
def test_a_wrong_argument_is_named(visitor, arguments, says):
    """By HTTP, for gradio_client sends neither NaN nor a path that is no file."""
    values = {"question": "hello", "images": None, **CONTROLS, **arguments}
    with pytest.raises(Exception, match=says):
        visitor.call("chat", *values.values())


def test_images_of_elsewhere_are_not_fetched(client):
    file = {"path": "http://127.0.0.1:9/a.png", "meta": {"_type": "gradio.FileData"}}
    for place in range(2 + len(CONTROLS)):
        values = ["hello", None, *CONTROLS.values()]
        values[place] = [{"deeper": file}] if place == 1 else file
        event = httpx.post(f"{client.src}gradio_api/call/chat", json={"data": values}).json()[
            "event_id"
        ]
        answer = httpx.get(f"{client.src}gradio_api/call/chat/{event}", timeout=30).text
        assert "event: error" in answer and "addresses are not fetched" in answer, answer


def test_calls_that_nobody_listens_to_are_not_computed(server):
    """Twenty calls are made and left; the next visitor waits for none of them."""
    long = {**CONTROLS, "max_new_tokens": 400, "repetition_penalty": 1.5}
    start = time.monotonic()
    assert len(Visitor(server).chat("tell me everything", **long)[1][1]) > 500
    whole = time.monotonic() - start
    for _ in range(20):
        call = {"data": ["tell me everything", None, *long.values()]}
        assert httpx.post(f"{server.url}/gradio_api/call/chat", json=call).status_code == 200
    start = time.monotonic()
    assert len(Visitor(server).chat("next", max_new_tokens=2)) == 2
    waited = time.monotonic() - start
    print(
        f"a whole answer {whole:.1f} s; after 20 that nobody listens to the next visitor waited {waited:.1f} s"
    )
    assert waited < PATIENCE_S + 3 and waited < 10 * whole
    wait_until(lambda: is_idle(server), 10)


# arguments of every kind, passed to the function itself

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["path", "meta", "x"]), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted(SETTINGS)), JSON | st.floats(-1, 300) | st.integers(-1, 1000)
    )
)
def test_settings_are_refused_or_what_the_model_takes(values):
    try:
        numbers = checked(values)
    except ValueError as error:
        assert any(str(error).startswith(name) for name in values) and len(str(error)) < 120
        return
    assert set(numbers) == set(values)
    Sampling(**numbers)


@settings(max_examples=150, deadline=None)
@given(
    JSON,
    JSON | st.lists(st.fixed_dictionaries({"path": st.text(max_size=8) | st.just("/etc/passwd")})),
)
def test_a_question_is_refused_or_becomes_a_turn(api, question, images):
    try:
        turn = api.turn(question, images)
    except ValueError as error:
        assert str(error).startswith(("question: ", "images: "))
        return
    assert isinstance(turn, Turn) and turn.text.encode() is not None
    assert all(Path(path).resolve().is_relative_to(api.folder) for path in turn.images)


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    from minigpt4.serving.api import Api

    return Api(None, {}, None, tmp_path_factory.mktemp("uploads").resolve())


def test_the_end_of_an_answer_leaves_the_box_alone(visitor):
    """gradio sends the last update of an answer twice; in between somebody may have typed or added an image."""
    visitor.ask("hello")
    box = visitor.call("answer", None, *CONTROLS.values())[0]
    assert box["submit_btn"] is True and "value" not in box
