"""The OpenAI API as programs see it: the real server in a process of its own, the real `openai` client."""

import base64
import concurrent.futures
import json
import re
import socket

import httpx
import openai
import pytest

from minigpt4.serving.answers import SETTINGS
from tests.serving.server import Server, is_idle, wait_until
from tests.serving.test_hostile import EPS, SVG, TEXTS, png
from tests.small_release import jpeg_bytes, picture

KEY = "a key"
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": 24}


class ApiServer(Server):
    """A running minigpt4.serve."""

    program = ("-m", "minigpt4.serve")
    ready = r"Serving tiny at (http://[\d.]+:\d+)/v1"


@pytest.fixture(scope="module")
def api(roomy, tmp_path_factory):
    log = tmp_path_factory.mktemp("api") / "log.txt"
    server = ApiServer(roomy, log, "--server-port", "0", "--api-key", KEY, "--model-name", "tiny")
    yield server
    server.close()
    assert "Traceback" not in server.output()


@pytest.fixture(scope="module")
def client(api):
    return openai.OpenAI(base_url=f"{api.url}/v1", api_key=KEY, max_retries=0, timeout=120)


def url(data):
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def user(text, *seeds):
    parts = [
        {"type": "image_url", "image_url": {"url": url(jpeg_bytes(picture(seed)))}}
        for seed in seeds
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def said(loaded, tmp_path_factory):
    """A function: what `Chat` answers to turns: (text, number of prompt tokens, of answer tokens)."""
    chat, empty = loaded
    folder = tmp_path_factory.mktemp("images")

    def answer(*turns, system=None):
        conv, images = empty.copy(), []
        if system is not None:
            conv.system = system
        for kind, text, *seeds in turns:
            if kind == "assistant":
                conv.append_message(conv.roles[1], text)
                continue
            for seed in seeds:
                (folder / f"{seed}.jpg").write_bytes(jpeg_bytes(picture(seed)))
                chat.upload_img(folder / f"{seed}.jpg", conv, images)
            chat.ask(text, conv)
        context = chat.answer_prepare(conv, images, max_new_tokens=24)["context"]
        text, ids = chat.answer(conv, images, temperature=0, max_new_tokens=24)
        return text, len(context.ids), len(ids)

    return answer


def messages(*turns):
    return [(user if kind == "user" else assistant)(*rest) for kind, *rest in turns]


def streamed(client, **request):
    """Return (text, the reason why it ended, usage, pieces) of a streamed answer."""
    pieces, reason, usage = [], None, None
    for chunk in client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    ):
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            reason = choice.finish_reason or reason
        usage = chunk.usage or usage
    return "".join(pieces), reason, usage, pieces


DIALOGUES = {
    "text only": [("user", "what is this?")],
    "an image": [("user", "what is this?", 1)],
    "two images": [("user", "which is larger?", 1, 2)],
    "several turns": [
        ("user", "what is this?", 3),
        ("assistant", "It is a wall."),
        ("user", "and this?", 4),
        ("assistant", "A castle."),
        ("user", "who watched?"),
    ],
    **{f"typed: {name}": [("user", text)] for name, text in TEXTS.items()},
    "typed <image>": [("user", "<image> what is this? <image>", 5)],
}


@pytest.mark.parametrize("turns", DIALOGUES.values(), ids=DIALOGUES)
def test_answers_equal_those_of_the_chat(client, said, turns):
    text, num_prompt, num_answer = said(*turns)
    whole = client.chat.completions.create(messages=messages(*turns), **GREEDY)
    assert whole.choices[0].message.content == text
    counts = (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens)
    assert counts == (num_prompt, num_answer, num_prompt + num_answer)
    assert whole.choices[0].finish_reason == ("length" if num_answer == 24 else "stop")
    in_pieces, reason, usage, pieces = streamed(client, messages=messages(*turns), **GREEDY)
    assert (in_pieces, reason) == (text, whole.choices[0].finish_reason)
    assert usage.completion_tokens == num_answer and (len(pieces) > 5 or num_answer < 24)


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message(client, said, role):
    text, num_prompt, _ = said(("user", "what is this?"), system="Answer as a poet.")
    sent = [{"role": role, "content": "Answer as a poet."}, user("what is this?")]
    reply = client.chat.completions.create(messages=sent, **GREEDY)
    assert (reply.choices[0].message.content, reply.usage.prompt_tokens) == (text, num_prompt)


def test_an_image_stands_where_it_is_sent(client):
    """Between texts it is not the same prompt as before them; behind the text it is."""
    image, words = user("what is this?", 1)["content"]
    first, second = words | {"text": "what"}, words | {"text": "is this?"}
    orders = [(image, first, second), (first, image, second), (first, second, image)]
    sent = [{"role": "user", "content": list(order)} for order in orders]
    replies = [client.chat.completions.create(messages=[each], **GREEDY) for each in sent]
    before, between, behind = (reply.choices[0].message.content for reply in replies)
    assert before == behind != between


def test_stop_strings(client, said):
    text = said(("user", "what is this?", 1))[0]
    stop = text[9:12]
    expected = text[: text.index(stop)].strip()
    request = {**GREEDY, "messages": [user("what is this?", 1)], "stop": [stop, "not in it"]}
    reply = client.chat.completions.create(**request)
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (expected, "stop")
    assert streamed(client, **request)[:2] == (expected, "stop")


def test_seeds_and_settings(client):
    def text(**settings):
        request = {
            "model": "tiny",
            "messages": [user("tell me")],
            "max_completion_tokens": 24,
            **settings,
        }
        return client.chat.completions.create(**request).choices[0].message.content

    assert text(seed=1) == text(seed=1) != text(seed=2)
    first = {name: SETTINGS[name].first for name in ("temperature", "top_p")}
    assert text(seed=1) == text(seed=1, **first, extra_body={"top_k": SETTINGS["top_k"].first})
    assert text(top_p=0.05, temperature=2, extra_body={"top_k": 1}) == text(temperature=0)


def test_settings_that_change_nothing_are_taken(client, said):
    neutral = {"n": 1, "tools": [], "logprobs": False, "logit_bias": {}, "user": "me"}
    neutral |= {"presence_penalty": 0, "frequency_penalty": 0, "metadata": {"a": "b"}}
    neutral |= {"response_format": {"type": "text"}, "extra_body": {"repetition_penalty": 1}}
    reply = client.chat.completions.create(messages=[user("what is this?")], **GREEDY, **neutral)
    assert reply.choices[0].message.content == said(("user", "what is this?"))[0]


def test_the_oldest_turns_of_a_long_dialogue_are_left_out_and_said(http):
    turns = [user("dog " * 150), assistant("A dog.")] * 20
    request = {**GREEDY, "messages": [*turns, user("what is this?")]}
    reply = http.post("/v1/chat/completions", json=request).json()
    (notice,) = reply["notices"]
    assert "oldest" in notice and reply["usage"]["prompt_tokens"] < 2000
    with http.stream("POST", "/v1/chat/completions", json=request | {"stream": True}) as events:
        assert sum(notice in line for line in events.iter_lines()) == 1


def test_the_next_turn_computes_only_what_is_new(client):
    sent = [user("tell me about the old castle", 6)]
    first = client.chat.completions.create(messages=sent, **GREEDY)
    sent += [assistant(first.choices[0].message.content), user("and then?")]
    second = client.chat.completions.create(messages=sent, **GREEDY)
    cached = second.usage.prompt_tokens_details.cached_tokens
    # the answer is cached, too, as far as its text has the same tokens
    assert cached > first.usage.prompt_tokens


def test_models_and_health(api, client):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve(
        "tiny"
    ).id == "tiny"
    assert httpx.get(f"{api.url}/health").json()["status"] == "ok"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.models.retrieve("large")


def test_wrong_keys_are_refused_and_lock_nobody_out(api):
    with pytest.raises(openai.AuthenticationError, match="wrong API key"):
        openai.OpenAI(base_url=f"{api.url}/v1", api_key="another", max_retries=0).models.list()
    keys = [None, "Bearer", f"Basic {KEY}", "Bearer another", f"Bearer {KEY}x", f"Bearer {KEY}"]
    found = []
    for key in keys:
        headers = {"authorization": key} if key else {}
        found.append(httpx.get(f"{api.url}/v1/models", headers=headers))
    assert [reply.status_code for reply in found] == [401] * 5 + [200]
    assert found[0].json()["error"]["code"] == "invalid_api_key"


def test_other_names_of_this_machine_and_other_pages_are_refused(api):
    headers = {"authorization": f"Bearer {KEY}"}
    assert (
        httpx.get(f"{api.url}/v1/models", headers={**headers, "host": "evil.example"}).status_code
        == 421
    )
    assert (
        httpx.get(
            f"{api.url}/v1/models", headers={**headers, "origin": "http://evil.example"}
        ).status_code
        == 403
    )
    assert httpx.get(f"{api.url}/health", headers={"host": "evil.example"}).status_code == 421


def of_image(data):
    return {
        "messages": [
            user("x", 1) | {"content": [{"type": "image_url", "image_url": {"url": data}}]}
        ]
    }


def nested(depth):
    return [nested(depth - 1)] if depth else []


JPEG = url(jpeg_bytes(picture(1)))
# what is tried -> status, what the error says
REFUSED = {
    "30 MB": ({"messages": [user("a" * 30_000_000)]}, 413, "more than 29,360,128 bytes"),
    "characters without end": (
        {"messages": [user("a " * 200_000)]},
        400,
        "400,000 characters; at most 32,768",
    ),
    "more than the context": ({"messages": [user("dog " * 8_000)]}, 400, "shorten the question"),
    "no message": ({"messages": []}, 400, "messages"),
    "blank": ({"messages": [user(" \n")]}, 400, "the message is empty"),
    "messages a word": ({"messages": "hello"}, 400, "messages"),
    "a number for text": (
        {"messages": [{"role": "user", "content": 5}]},
        400,
        r"messages\.0\.content",
    ),
    "an unknown role": (
        {"messages": [{"role": "tool", "content": "x"}]},
        400,
        r"messages\.0\.role",
    ),
    "the answer last": (
        {"messages": [user("x"), assistant("y")]},
        400,
        "the last one must be the user's",
    ),
    "nested too deep": ({"messages": nested(100)}, 400, "nested more than 32 deep"),
    "too many messages": ({"messages": [user("x")] * 501}, 400, "at most 500"),
    "another model": ({"model": "large"}, 404, "this server has 'tiny'"),
    "temperature of 3000": ({"temperature": 3000}, 400, "temperature: 3000"),
    "temperature a word": ({"temperature": "hot"}, 400, "temperature"),
    "no token": ({"max_tokens": 0}, 400, "max_tokens: 0"),
    "half a token": ({"max_tokens": 1.5}, 400, "whole number"),
    "seed of 30 digits": ({"seed": 10**30}, 400, "seed"),
    "two answers": ({"n": 2}, 400, "n: 2 is not supported"),
    "tools": ({"tools": [{"type": "function"}]}, 400, "tools"),
    "logprobs": ({"logprobs": True}, 400, "logprobs: True is not supported"),
    "json alone": ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    "a penalty": ({"presence_penalty": 1}, 400, "presence_penalty: 1 is not supported"),
    "an unknown setting": ({"num_beams": 5}, 400, "num_beams"),
    "five stop strings": ({"stop": ["a"] * 5}, 400, "stop"),
    "an empty stop string": ({"stop": [""]}, 400, "stop"),
    "svg": (of_image(url(SVG)), 400, "expected an image"),
    "postscript": (of_image(url(EPS)), 400, "expected an image"),
    "half a jpeg": (of_image(url(jpeg_bytes(picture(1, (640, 480)))[:3000])), 400, "truncated"),
    "a bomb of 64 million pixels": (of_image(url(png(8_000, 8_000))), 400, "at most 36,000,000"),
    "a long thin bomb": (of_image(url(png(1_000_000, 40))), 400, "at most 36,000,000"),
    "an image of 21 MB": (of_image(url(bytes(21 * 10**6))), 400, "more than 20,000,000 bytes"),
    "no base64": (of_image("data:image/png;base64,$$$"), 400, "base64"),
    "data of another type": (of_image("data:text/html;base64,AAAA"), 400, "expected data:image"),
    "a file": (of_image("file:///etc/passwd"), 400, "expected data:image"),
    "a path": (of_image("/etc/passwd"), 400, "expected data:image"),
    "an address": (of_image("http://127.0.0.1/x.png"), 400, "does not fetch addresses"),
    "nine images": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": JPEG}}] * 9}
            ]
        },
        400,
        "9 images in one message; at most 8",
    ),
    "65 images": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": JPEG}}] * 5}
            ]
            * 13
        },
        400,
        "65 images; at most 64",
    ),
    "an image of the assistant": (
        {"messages": [{**user("x", 1), "role": "assistant"}, user("x")]},
        400,
        "images of the assistant",
    ),
}


@pytest.fixture(scope="module")
def http(api):
    return httpx.Client(base_url=api.url, headers={"authorization": f"Bearer {KEY}"}, timeout=120)


@pytest.mark.parametrize(("changes", "status", "says"), REFUSED.values(), ids=REFUSED)
def test_refused_clearly_and_the_next_request_works(http, changes, status, says):
    request = {**GREEDY, "messages": [user("hello")], "max_tokens": 2}
    for stream in (False, True):
        reply = http.post("/v1/chat/completions", json={**request, **changes, "stream": stream})
        error = reply.json()["error"]
        assert (reply.status_code, set(error)) == (status, {"message", "type", "param", "code"})
        assert re.search(says, error["message"]) and "/root" not in error["message"]
    assert http.post("/v1/chat/completions", json=request).status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"null", b"[]", b"\xff\xfe", b'{"a": NaN}', b'{"model": "\\ud800"}']
)
def test_bodies_that_are_no_request(http, body):
    reply = http.post("/v1/chat/completions", content=body)
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"


def test_unknown_addresses(http):
    for method, path, status in (
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/embeddings", 404),
    ):
        reply = http.request(method, path)
        assert reply.status_code == status and path in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [
        ("/v1/chat/completions", KEY, 413),
        ("/v1/chat/completions", "wrong", 401),
        ("/v1/embeddings", KEY, 404),
    ],
)
def test_who_sends_a_large_body_to_its_end_reads_the_refusal(http, path, key, status):
    """The rest of a body that nobody wants is read: closing before would reset the connection."""
    address, size = (http.base_url.host, http.base_url.port), 30_000_000
    lines = [f"host: {address[0]}", f"authorization: Bearer {key}", f"content-length: {size}"]
    head = "\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""])
    with socket.create_connection(address) as connection:
        connection.sendall(head.encode() + bytes(size))
        reply = connection.makefile("rb").read()
    assert reply.startswith(f"HTTP/1.1 {status}".encode())
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_fifty_clients_of_whom_ten_vanish(api, client, http):
    """Those who stay get the answers that they get alone, of those who leave nothing stays, memory is flat."""
    dialogues = [
        [user(f"what is number {number}?", *[number] * (number % 2))] for number in range(5)
    ]
    alone = [
        client.chat.completions.create(messages=each, **GREEDY).choices[0].message.content
        for each in dialogues
    ]
    long = {**GREEDY, "max_tokens": 1000, "repetition_penalty": 1.5, "stream": True}

    def ask(number):
        if number % 5 == 4:
            with http.stream(
                "POST", "/v1/chat/completions", json={**long, "messages": dialogues[0]}
            ) as reply:
                return next(reply.iter_lines()) if number % 10 == 4 else ""  # and vanishes
        request = {"messages": dialogues[number % 5], **GREEDY}
        if number % 3:
            return client.chat.completions.create(**request).choices[0].message.content
        return streamed(client, **request)[0]

    def round_of_fifty():
        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(ask, range(50)))
        stayed = [number for number in range(50) if number % 5 != 4]
        assert [answers[number] for number in stayed] == [alone[number % 5] for number in stayed]
        wait_until(lambda: httpx.get(f"{api.url}/health").json()["waiting"] == 0, 60)

    round_of_fifty()
    memory = api.memory_mib()
    for _ in range(2):
        round_of_fifty()
    print(f"memory {memory:.0f} MiB after 50 clients, {api.memory_mib():.0f} MiB after 150")
    assert api.memory_mib() < 1.05 * memory
    wait_until(lambda: is_idle(api), 60)


def test_a_full_line_says_so(api, http):
    """65 clients that begin a request and do not end it hold every place; when they leave, others are served."""
    request = {**GREEDY, "messages": [user("hello")]}
    address = (http.base_url.host, http.base_url.port)
    lines = [f"host: {address[0]}", f"authorization: Bearer {KEY}", "content-length: 9", "", ""]
    head = "\r\n".join(["POST /v1/chat/completions HTTP/1.1", *lines])
    waiting = [socket.create_connection(address) for _ in range(65)]
    for connection in waiting:
        connection.sendall(head.encode())
    wait_until(lambda: http.get("/health").json()["waiting"] == 65, 60)
    reply = http.post("/v1/chat/completions", json=request)
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    for connection in waiting:
        connection.close()
    wait_until(lambda: http.get("/health").json()["waiting"] == 0, 60)
    assert http.post("/v1/chat/completions", json=request).status_code == 200


def test_events_have_the_form_that_clients_of_the_api_read(http):
    request = {**GREEDY, "messages": [user("hello")], "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=request) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len(
        {c["id"] for c in chunks}
    ) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] in ("stop", "length")
