"""The limits on a request's JSON."""

import asyncio
import json
import time

import pytest
from starlette.datastructures import Headers

from minigpt4.serving.limits import Body, Refusal


def read(content):
    """Return what is passed on of a request with this body."""

    async def receive():
        return {"type": "http.request", "body": content, "more_body": False}

    async def through():
        body = Body(receive, Headers({"content-length": str(len(content))}))
        return (await (await body.read(2**26))())["body"]

    return asyncio.run(through())


# each has a shape for which a careless pattern needs quadratic time, memory, or both
LARGE = {
    "a string of escapes without end": b'{"a":"' + rb"\"" * 2**20,
    "backslashes without end": b'{"a":"' + rb"\\" * 2**20,
    "quotes": b'"' * 2**21,
    "pairs of brackets": b"[]" * 2**20,
}


@pytest.mark.parametrize("content", LARGE.values(), ids=LARGE)
def test_two_megabytes_of_any_shape_are_checked_in_no_time(content):
    start = time.process_time()
    assert read(content) == content
    assert time.process_time() - start < 2  # measured: 0.1


def test_other_requests_are_served_while_a_large_one_is_checked():
    content = b"[]" * 2**21

    async def receive():
        return {"type": "http.request", "body": content, "more_body": False}

    async def turns_of_others():
        body = Body(receive, Headers({"content-length": str(len(content))}))
        reading, turns = asyncio.ensure_future(body.read(2**26)), 0
        while not reading.done():
            await asyncio.sleep(0)
            turns += 1
        await reading
        return turns

    assert asyncio.run(turns_of_others()) > 10


@pytest.mark.parametrize(
    ("text", "is_deep"),
    [
        ("[" * 32 + "]" * 32, False),
        ("[" * 33 + "]" * 33, True),
        ('{"a":' * 33, True),
        (json.dumps(["[" * 99, '"' + "[" * 99, "\\" + "[" * 99, '\\"' + "[" * 99]), False),
        # the string ends before the brackets: its last backslash is escaped
        (json.dumps("\\") + "[" * 33, True),
        (json.dumps('\\\\"') + "[" * 33, True),
        ('"' + "[" * 99, False),
    ],
)
def test_depth_is_that_of_brackets_outside_strings(text, is_deep):
    if not is_deep:
        assert read(text.encode()) == text.encode()
        return
    with pytest.raises(Refusal, match="nested more than 32 deep"):
        read(text.encode())
