"""The OpenAI API over HTTP: who may ask, what they ask, answers whole or streamed, errors in OpenAI's shape."""

import asyncio
import hmac
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from minigpt4.conversation.chat import Chat
from minigpt4.conversation.conversation import Conversation
from minigpt4.serving.answers import Line, LineFullError
from minigpt4.serving.guard import SAFE, Hosts
from minigpt4.serving.limits import Refusal, Tries, discard, network_of, whole
from minigpt4.serving.openai_answers import event, finish_reason, notices, refused, usage
from minigpt4.serving.openai_batches import Batches, Job
from minigpt4.serving.openai_images import Images
from minigpt4.serving.openai_schema import ChatRequest

MOST_BYTES = 28 * 2**20  # of a request: the largest image in base64, and text
MOST_BYTES_ALL = 256 * 2**20  # of the requests that are being read
READ_S = 120  # for one request to come
EVENTS = "text/event-stream"
STREAM = {**SAFE, "cache-control": "no-cache", "x-accel-buffering": "no"}  # nginx passes pieces on


class OpenAI:
    """The API of one model; `asgi` is what a server runs."""

    def __init__(
        self,
        chat: Chat,
        template: Conversation,
        name: str,
        hosts: Hosts,
        api_key: str | None = None,
        defaults: dict[str, float] | None = None,
        is_fetching: bool = False,
        batch_size: int = 8,
        most_waiting: int = 64,
    ):
        self.chat, self.template = chat, template
        self.name, self.defaults = name, defaults or {}
        self.hosts, self.api_key = hosts, api_key
        self.tries = Tries()
        self.line, self.images = Line(most_waiting), Images(chat, is_fetching)
        self.batches = Batches(chat, batch_size)
        self.started = int(time.time())
        self._num_bytes = 0  # of the requests that are being read

    @property
    def asgi(self) -> ASGIApp:
        """The ASGI application."""
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/v1/chat/completions", Completions(self), methods=["POST"]),
        ]
        handlers = dict.fromkeys((Refusal, ValueError, OSError, Exception), _on_error)
        handlers[HTTPException] = _on_http
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.batches.close)

    def admit(self, scope: Scope) -> None:
        """Raise Refusal unless a request is addressed to this server and has its key."""
        headers = Headers(scope=scope)
        self.hosts.check(headers)
        if self.api_key is None:
            return
        # each wrong key counts, as wrong passwords of the page do
        attempt = self.tries.begin(network_of(scope))
        kind, key = (*headers.get("authorization", "").split(" ", 1), "", "")[:2]
        is_ours = hmac.compare_digest(key.strip().encode(), self.api_key.encode())
        if kind.lower() != "bearer" or not is_ours:
            raise Refusal(401, "wrong API key: send Authorization: Bearer KEY")
        self.tries.forgive(attempt)

    async def health(self, request: Request) -> JSONResponse:
        """Say that the server is there; anybody may ask."""
        self.hosts.check(request.headers)
        return JSONResponse({"status": "ok", "waiting": len(self.line)}, headers=SAFE)

    async def models(self, request: Request) -> JSONResponse:
        """Name the one model."""
        self.admit(request.scope)
        model = {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "minigpt4",
        }
        if name := request.path_params.get("name"):
            self.check_model(name)
            return JSONResponse(model, headers=SAFE)
        return JSONResponse({"object": "list", "data": [model]}, headers=SAFE)

    def check_model(self, name: str) -> None:
        """Raise Refusal for the name of another model."""
        if name != self.name:
            raise Refusal(
                404, f"the model {name[:100]!r} does not exist; this server has {self.name!r}"
            )

    @contextmanager
    def room(self, headers: Headers) -> Iterator[None]:
        """Count the bytes that a request announces. Raises Refusal where there are too many at once."""
        length = min(int(headers.get("content-length", MOST_BYTES)), MOST_BYTES)
        if self._num_bytes + length > MOST_BYTES_ALL:
            raise Refusal(429, "too many large requests at once: try again in a moment")
        self._num_bytes += length
        try:
            yield
        finally:
            self._num_bytes -= length


class Completions:
    """POST /v1/chat/completions, as an ASGI application: the coroutine that answers sees whether the client leaves."""

    def __init__(self, api: OpenAI):
        self.api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; whoever leaves is not answered any more. Raises what `_on_error` tells the client."""
        api, headers = self.api, Headers(scope=scope)
        with ExitStack() as place, ExitStack() as room:
            try:
                api.admit(scope)
                place.enter_context(api.line.place())
                room.enter_context(api.room(headers))
            except (Refusal, LineFullError):
                await discard(receive, headers)
                raise
            try:
                receive = await asyncio.wait_for(whole(receive, headers, MOST_BYTES), READ_S)
            except asyncio.TimeoutError:
                raise Refusal(408, f"the request did not come within {READ_S} s") from None
            # whichever ends first: the answer, or the client's patience
            body = await Request(scope, receive).body()
            work = asyncio.ensure_future(self._answer(body, room, scope, send))
            del body
            left = asyncio.ensure_future(_left(receive))
            try:
                await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    work.result()
            finally:
                work.cancel()
                left.cancel()
                await asyncio.gather(work, left, return_exceptions=True)

    async def _answer(self, body: bytes, room: ExitStack, scope: Scope, send: Send) -> None:
        """Answer a request; `room` is left once its images are read, and nothing large waits for the model."""
        request = await asyncio.to_thread(ChatRequest.read, body)
        self.api.check_model(request.model)
        job = await self._job(request)
        is_streamed, options = request.stream, request.stream_options
        has_usage = options is not None and bool(options.include_usage)
        # the body holds whole images
        del body, request
        room.close()
        self.api.batches.add(job)
        try:
            async with aclosing(job.pieces()) as pieces:
                # what is refused is refused before anything is sent
                first = await anext(pieces, None)
                if is_streamed:
                    events = self._events(job, has_usage, first, pieces)
                    response = StreamingResponse(events, headers=STREAM, media_type=EVENTS)
                else:
                    whole_answer = self._completion(job, first, [piece async for piece in pieces])
                    response = JSONResponse(whole_answer, headers=SAFE)
                await response(scope, _never, send)
        finally:
            job.stop.set()

    async def _job(self, request: ChatRequest) -> Job:
        """Return the request as a job. Raises ValueError or OSError for what is wrong with it."""
        settings = request.settings(self.api.defaults)
        conv = await asyncio.to_thread(request.conversation, self.api.chat, self.api.template)
        images = [await self.api.images.read(url) for url in request.image_urls]
        return Job(conv, images, settings)

    def _completion(self, job: Job, first: str | None, pieces: list[str]) -> dict[str, object]:
        """Return the whole answer as the API has it."""
        message = {"role": "assistant", "content": (first or "") + "".join(pieces)}
        reason = finish_reason(job)
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        rest = {"choices": [choice], "usage": usage(job)}
        return self._head("chat.completion") | rest | notices(job)

    async def _events(
        self, job: Job, has_usage: bool, first: str | None, pieces: AsyncIterator[str]
    ) -> AsyncIterator[str]:
        """Yield server-sent events: a chunk for each piece, the last with the reason why it ends, [DONE]."""
        head = self._head("chat.completion.chunk")

        def chunk(delta: dict[str, str], reason: str | None = None, **more: object) -> str:
            choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
            return event(head | {"choices": choices} | more)

        yield chunk({"role": "assistant", "content": first or ""})
        try:
            async for piece in pieces:
                yield chunk({"content": piece})
        except Exception as error:
            yield event(refused(error)[1])
            return
        yield chunk({}, finish_reason(job), **notices(job))
        if has_usage:
            yield event(head | {"choices": [], "usage": usage(job)})
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, object]:
        identity = f"chatcmpl-{uuid.uuid4().hex}"
        return {"id": identity, "object": kind, "created": int(time.time()), "model": self.api.name}


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _never() -> dict:
    """Stand in for `receive` where `_left` already reads it."""
    return await asyncio.get_running_loop().create_future()


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    status, body = refused(error)
    # what is still to come is not read
    return JSONResponse(body, status, headers={**SAFE, "connection": "close"})


async def _on_http(request: Request, error: HTTPException) -> JSONResponse:
    told = f"{request.method} {request.url.path}: {error.detail}"
    return await _on_error(request, Refusal(error.status_code, told))
