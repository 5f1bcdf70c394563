"""A real `transformers serve` streams answers about an image; greedy text is the same as that of our chat."""

import base64
import importlib.util
import io
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import minigpt4
from tests.small_release import picture

# packages of transformers[serving] that the project does not need itself
NEEDED = (
    "fastapi",
    "openai",
    "requests",
    "rich",
    "uvicorn",
)
SECONDS = 300  # for the server to come up on a busy machine


@pytest.fixture(scope="module")
def server(folders, hub):
    """Return an OpenAI client of a server with the export loaded, and the model's name."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        pytest.skip(f"pip install transformers[serving]: {', '.join(missing)} not installed")
    from openai import OpenAI

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = [str(Path(sys.executable).with_name("transformers")), "serve", str(folders.hf)]
    process = subprocess.Popen(
        [*program, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"], env=hub.env
    )
    try:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(1)
        assert process.poll() is None, "transformers serve ended, see above"
        yield OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=SECONDS, max_retries=0
        )
    finally:
        process.terminate()
        process.wait(30)


def url_of(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def test_greedy_text_is_that_of_a_chat(folders, server):
    chat, template = minigpt4.load(str(folders.checkpoint), ["run.device=cpu"])
    # an image of the model's size, as the server resizes with torchvision
    image = picture(3, (chat.model.image_size,) * 2)
    conv, images = template.copy(), []
    chat.upload_img(image, conv, images)
    chat.ask("What is it?", conv)
    ours, _ = chat.answer(conv, images, temperature=0, max_new_tokens=12)
    content = [
        {"type": "image_url", "image_url": {"url": url_of(image)}},
        {"type": "text", "text": "What is it?"},
    ]
    messages = [{"role": "user", "content": content}]
    stream = server.chat.completions.create(
        model=str(folders.hf), messages=messages, stream=True, max_tokens=12, temperature=0
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(ours.split()) > 3 and sum(map(bool, pieces)) > 3
    assert "".join(pieces).strip() == ours


@pytest.mark.parametrize("name", ["a text alone", "stop", "a typed <image>"])
def test_what_it_cannot_answer(folders, server, name):
    """The limits that docs/serving.md states; our own server answers all three requests."""
    from openai import InternalServerError

    request = {"model": str(folders.hf), "max_tokens": 4}
    if name == "a text alone":
        request["messages"] = [{"role": "user", "content": "What is it?"}]
    else:
        text = "What is <image>?" if name == "a typed <image>" else "What is it?"
        content = [{"type": "image_url", "image_url": {"url": url_of(picture(3))}}]
        request["messages"] = [
            {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        ]
        request |= {"stop": ["x"]} if name == "stop" else {}
    # After such an error the server closes the connection, so the client may have to try once more.
    with pytest.raises(InternalServerError):
        server.with_options(max_retries=1).chat.completions.create(**request)
