"""The checks of every request before gradio sees it: names, origins, paths, sizes, passwords, uploads."""

import concurrent.futures
import os
import socket
import threading
from pathlib import Path
from unittest import mock

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers

from minigpt4.serving import uploads
from minigpt4.serving.demo import environment_of_gradio
from minigpt4.serving.guard import Hosts
from minigpt4.serving.limits import MOST_BYTES, Refusal, Tries, network_of
from tests.serving.server import Visitor
from tests.serving.test_hostile import png

LOCAL, WIDE = "127.0.0.1", "0.0.0.0"


def is_answered(server, host, origin=None):
    """Return whether a server, its Hosts or its name, answers a request to `host`, or to several."""
    hosts = server if isinstance(server, Hosts) else Hosts(server)
    headers = (
        [(b"host", host.encode())]
        if isinstance(host, str)
        else [(b"host", one.encode()) for one in host]
    )
    if origin is not None:
        headers.append((b"origin", origin.encode()))
    try:
        hosts.check(Headers(raw=headers))
    except Refusal:
        return False
    return True


@pytest.mark.parametrize(
    ("server_name", "host"),
    [
        *[
            (LOCAL, host)
            for host in ("127.0.0.1:7860", "localhost", "LOCALHOST:9", "[::1]:7860", "127.0.0.2:80")
        ],
        *[("localhost", host) for host in ("localhost:7860", "127.0.0.1:7860")],
        *[("::1", host) for host in ("[::1]:7860", "localhost:7860")],
        *[
            ("192.0.2.7", host)
            for host in ("192.0.2.7:7860", "localhost:7860", os.uname().nodename)
        ],
        *[
            (WIDE, host)
            for host in ("192.0.2.7", "[2001:db8::7]:80", "localhost:7860", os.uname().nodename)
        ],
    ],
)
def test_a_server_answers_to_its_names(server_name, host):
    assert is_answered(server_name, host)
    assert is_answered(server_name, host, f"http://{host}")
    for origin in (
        "http://elsewhere.example",
        "null",
        "http://localhost:1",
        f"http://{host}.elsewhere.example",
        "x",
    ):
        assert not is_answered(server_name, host, origin)


@pytest.mark.parametrize("server_name", [LOCAL, "localhost", "::1", "192.0.2.7", WIDE])
@pytest.mark.parametrize(
    "host",
    [
        *(
            "rebound.example",
            "rebound.example:7860",
            "localhost.rebound.example",
            "127.0.0.1.rebound.example",
            "x",
        ),
        *(
            "",
            " ",
            "localhost ",
            "localhost:",
            "localhost:x",
            "me@localhost",
            "localhost/x",
            "localhost#x",
            "[::1",
            "::1",
        ),
        *(
            "[]",
            "[localhost]",
            "localhost,localhost",
            "127.1",
            "2130706433",
            "\u212aocalhost",
            "localhost\x00",
        ),
    ],
)
def test_no_server_answers_to_the_names_of_others(server_name, host):
    assert not is_answered(server_name, host)
    assert not is_answered(server_name, ["localhost", host]) and not is_answered(server_name, [])


def test_a_local_server_has_no_address_in_the_network():
    assert not is_answered(LOCAL, "192.0.2.7:7860") and not is_answered(LOCAL, "0.0.0.0:7860")


def test_a_proxy_in_front_may_have_a_name_of_its_own():
    hosts = Hosts(LOCAL)
    hosts.add_root("https://chat.example/minigpt4")
    assert is_answered(hosts, "chat.example")
    assert is_answered(hosts, "127.0.0.1:7860", "https://chat.example")
    assert not is_answered(hosts, "127.0.0.1:7860", "https://evil.chat.example")


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), st.sampled_from([LOCAL, WIDE]))
def test_any_text_as_host_is_refused_or_an_address(text, server_name):
    host = text.encode("latin-1", "replace").decode("latin-1")
    if is_answered(server_name, host):
        assert (
            httpx.URL(f"http://{host}").host in ("localhost", "127.0.0.1", "::1")
            or server_name == WIDE
        )


# the running server

CLOSED = [
    "monitoring",
    "monitoring/summary",
    "gradio_api/deep_link?session_hash=x",
    "gradio_api/openapi.json",
]
CLOSED += [
    "gradio_api/runs",
    "gradio_api/dev/reload",
    "gradio_api/proxy=http://localhost",
    "gradio_api/app_id",
]
CLOSED += [
    "gradio_api/stream/x/y/1/playlist.m3u8",
    "docs",
    "login/",
    "MONITORING",
    "assets/../monitoring",
    "svelte/x.js",
]
CLOSED_TO_POST = [
    "process_recording",
    "vibe-edit",
    "component_server",
    "call/ask",
    "call/v2/answer",
    "run/ask",
    "api/ask",
]


@pytest.mark.parametrize("path", CLOSED)
def test_what_the_page_has_no_use_for_is_closed(visitor, path):
    request = visitor.http.build_request("GET", "/")
    request.url = request.url.copy_with(raw_path=f"/{path}".encode())
    assert visitor.http.send(request).status_code == 404


@pytest.mark.parametrize("path", CLOSED_TO_POST)
def test_what_could_write_or_compute_is_closed(visitor, path):
    reply = visitor.http.post(
        f"/gradio_api/{path}", json={"data": [{"text": "hi", "files": []}, None]}
    )
    assert reply.status_code == 404, reply.text


def test_other_hosts_and_origins_get_nothing(visitor):
    for headers in (
        {"host": "rebound.example"},
        {"origin": "http://rebound.example"},
        {"origin": "null"},
    ):
        for path in ("/", "/config", "/gradio_api/info", "/gradio_api/file=/etc/passwd"):
            reply = visitor.http.get(path, headers=headers)
            assert reply.status_code in (403, 421) and len(reply.text) < 300
        assert visitor.http.post(
            "/gradio_api/queue/join", headers=headers, json={}
        ).status_code in (403, 421)
        assert visitor.http.post(
            "/gradio_api/upload", headers=headers, files={"files": b"x"}
        ).status_code in (403, 421)


def test_no_header_makes_links_lead_elsewhere(visitor):
    for name in ("x-forwarded-host", "x-gradio-server", "forwarded"):
        reply = visitor.http.get("/config", headers={name: "http://elsewhere.example"})
        assert "elsewhere.example" not in reply.text and reply.json()["root"] == str(
            visitor.http.base_url
        ).rstrip("/")


def test_the_page_may_load_nothing_from_elsewhere_and_nobody_frames_it(visitor):
    policy = visitor.http.get("/").headers["content-security-policy"]
    assert (
        policy.startswith("default-src 'self' ")
        and "http" not in policy
        and "frame-ancestors 'self'" in policy
    )


def test_an_upload_is_served_to_its_visitor_only(server):
    one, other = Visitor(server), Visitor(server)
    for visitor in (one, other):
        assert "HttpOnly; SameSite=Lax" in visitor.http.get("/").headers["set-cookie"]
    path = one.upload("mine.png", png(8, 8))["path"]
    assert one.http.get(f"/gradio_api/file={path}").content == png(8, 8)
    folder = os.path.dirname(os.path.dirname(path))
    for visitor in (other, Visitor(server)):
        for name in (
            path,
            path.replace("/mine", "//mine"),
            folder,
            f"{folder}/../../vicuna/config.json",
        ):
            assert visitor.http.get(f"/gradio_api/file={name}").status_code == 404
    assert os.stat(folder).st_mode & 0o077 == 0  # nor to other people of this machine


HUGE = 50 * 2**20


def test_a_text_of_50_mb_is_refused_by_its_size(visitor):
    body = {"data": ["x" * HUGE], "fn_index": visitor.numbers["chat"], "session_hash": "x"}
    for path in ("queue/join", "call/chat", "run/predict"):
        reply = visitor.http.post(f"/gradio_api/{path}", json=body)
        assert reply.status_code == 413 and f"{MOST_BYTES:,} bytes" in reply.text
    pieces = (b"x" * 2**20 for _ in range(50))  # no length is announced
    assert visitor.http.post("/gradio_api/queue/join", content=pieces).status_code == 413
    assert len(visitor.chat("hello")) == 2


@pytest.mark.parametrize("depth", [100, 1_000, 100_000, 1_000_000])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_that_is_nested_too_deep_is_refused(visitor, depth, opening):
    content = '{"fn_index": 0, "session_hash": "x", "data": [' + opening * min(
        depth, MOST_BYTES // 8
    )
    for path in ("queue/join", "call/chat", "cancel"):
        reply = visitor.http.post(
            f"/gradio_api/{path}", content=content, headers={"content-type": "application/json"}
        )
        assert reply.status_code == 400 and "deep" in reply.text


# passwords and uploads: gradio with the guard before it, without a model


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """Return (address, folder of uploads, cookies of somebody logged in) of a page with a password."""
    place = {"GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("uploads"))}
    with mock.patch.dict(os.environ, place), environment_of_gradio(LOCAL, share=False):
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        import gradio as gr
        from starlette.middleware import Middleware

        from minigpt4.serving.guard import Guard
        from minigpt4.serving.limits import Streams

        with gr.Blocks() as blocks:
            gr.Textbox()
        guard = Middleware(
            Guard, hosts=Hosts(LOCAL), uploads=uploads.Uploads(folder, []), streams=Streams()
        )
        launched = {
            "app_kwargs": {"middleware": [guard]},
            "prevent_thread_lock": True,
            "quiet": True,
        }
        url = blocks.launch(auth=("me", "right"), server_name=LOCAL, **launched)[1]
        yield url, folder, login(url, "right").cookies
        blocks.close()


def login(url, password, address="192.0.2.1"):
    """Try a password; nobody is believed who says to ask for somebody at another address."""
    headers = {"x-forwarded-for": address}
    return httpx.post(f"{url}login", data={"username": "me", "password": password}, headers=headers)


def test_guessing_a_password_is_slowed_down(guarded):
    url, _, cookies = guarded
    assert cookies
    for _ in range(9):
        httpx.get(f"{url}login")  # does not count as an attempt
    tries = [login(url, f"wrong {number}", f"192.0.2.{number}").status_code for number in range(7)]
    assert tries == [400] * 5 + [429] * 2
    reply = login(url, "right")  # now the right one is refused, too
    assert reply.status_code == 429 and "wait 60 seconds" in reply.text


@pytest.mark.parametrize(
    ("client", "network"),
    [
        *[
            (("192.0.2.7", 1), "192.0.2.7"),
            (("2001:db8::1:2:3:4", 1), "2001:db8::/64"),
            (("fe80::1%eth0", 1), "fe80::/64"),
        ],
        *[(("a:b", 1), "unknown"), (("", 1), "unknown"), (None, "unknown")],
    ],
)
def test_who_asks_is_known_by_the_network(client, network):
    assert network_of({"client": client}) == network


def test_tries_are_counted_for_each_address_and_for_all():
    tries = Tries()
    for number in range(50):
        tries.begin(f"address {number // 5}")
    with pytest.raises(Refusal, match="too many"):
        tries.begin("another address")
    tries.forgive(tries._tries[-1])
    tries.begin("another address")
    assert len(tries._tries) == 50


def files_in(folder):
    return {path.name for path in folder.rglob("*") if path.is_file()}


def test_uploads_are_bounded_for_each_visitor_and_for_all(guarded, monkeypatch):
    url, folder, cookies = guarded
    monkeypatch.setattr(uploads, "EACH", (4, 10_000))
    monkeypatch.setattr(uploads, "ALL", (6, 2**30))
    people = [httpx.Client(base_url=url) for _ in range(2)]
    for person in people:
        person.cookies.update(cookies)
        assert person.get("/").status_code == 200

    def give(person, name, size=100):
        content = name.encode() * size
        return person.post("/gradio_api/upload", files={"files": (name, content[:size])}).json()[0]

    paths = [give(people[0], f"one {number}.png") for number in range(6)]
    assert files_in(folder) == {f"one {number}.png" for number in (2, 3, 4, 5)}  # the latest four
    give(people[0], "large.png", 9_800)  # 10,000 bytes hold two of 100 beside it
    assert files_in(folder) == {"one 4.png", "one 5.png", "large.png"}
    for number in range(4):
        give(people[1], f"two {number}.png")
    # six of both visitors, and the upload in progress
    assert len(files_in(folder)) == 7 and "large.png" in files_in(folder)
    (folder / "left by an upload that was broken off").write_bytes(b"x")
    give(people[1], "two 4.png")
    assert len(files_in(folder)) <= 7 and "one 4.png" not in files_in(folder)
    assert people[0].get(f"/gradio_api/file={paths[0]}").status_code == 404


def test_room_is_made_while_other_uploads_come_and_go(tmp_path):
    """A file that is listed and gone a moment later is no error."""
    is_over = threading.Event()

    def come_and_go():
        while not is_over.is_set():
            for number in range(50):
                (tmp_path / str(number)).write_bytes(b"x")
            for number in range(50):
                (tmp_path / str(number)).unlink(missing_ok=True)

    with concurrent.futures.ThreadPoolExecutor(1) as other:
        others = other.submit(come_and_go)
        try:
            for _ in range(1000):
                uploads._remove_oldest(tmp_path, 10, 2**20)
        finally:
            is_over.set()
        others.result()


def test_an_upload_says_its_length_and_fits(guarded):
    url = guarded[0]
    pieces = (b"x" for _ in range(3))
    assert httpx.post(f"{url}gradio_api/upload", content=pieces).status_code == 411
    content = bytes(171 * 2**20)
    with httpx.Client(timeout=30) as http:
        assert http.post(f"{url}gradio_api/upload", content=content).status_code == 413


@pytest.mark.parametrize("path", ["gradio_api/upload", "gradio_api/queue/join", "elsewhere"])
def test_who_sends_a_large_body_to_its_end_reads_the_refusal(guarded, path, monkeypatch):
    """The rest of a body that nobody wants is read: closing before would reset the connection."""
    monkeypatch.setattr(uploads, "MOST_UPLOAD_BYTES", MOST_BYTES)
    url, size = httpx.URL(guarded[0]), 20 * 2**20
    head = f"POST /{path} HTTP/1.1\r\nhost: {url.host}\r\ncontent-length: {size}\r\n\r\n"
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(head.encode() + bytes(size))
        reply = connection.makefile("rb").read()
    assert reply.startswith(b"HTTP/1.1 404" if path == "elsewhere" else b"HTTP/1.1 413")
    assert reply.partition(b"\r\n\r\n")[2]


def test_who_waits_for_leave_to_send_a_large_body_gets_the_refusal_instead(guarded):
    url, length = httpx.URL(guarded[0]), 171 * 2**20
    lines = [f"host: {url.host}", f"content-length: {length}", "expect: 100-continue", "", ""]
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall("\r\n".join(["POST /gradio_api/upload HTTP/1.1", *lines]).encode())
        assert connection.makefile("rb").read().startswith(b"HTTP/1.1 413")
