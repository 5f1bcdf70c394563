"""The OpenAI API over HTTP: access, requests, complete and streamed answers, errors in OpenAI's format."""

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
from minigpt4.serving.answers import QueueFullError, WaitingQueue
from minigpt4.serving.guard import SECURITY_HEADERS, Hosts
from minigpt4.serving.limits import Body, Refusal
from minigpt4.serving.openai_answers import error_response, finish_reason, notices, sse_event, usage
from minigpt4.serving.openai_batches import Batches, Job
from minigpt4.serving.openai_images import Images
from minigpt4.serving.openai_schema import ChatRequest

MOST_BYTES = 28 * 2**20  # of a request: the largest image in base64, and text
MOST_BYTES_ALL = 256 * 2**20  # of all requests that are being read, and of all images as pixels
READ_S = 120  # to receive one request
# the last one makes nginx pass each event on at once
STREAM_HEADERS = {**SECURITY_HEADERS, "cache-control": "no-cache", "x-accel-buffering": "no"}


class OpenAI:
    """The API for one model; `asgi` is the application that a server runs."""

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
        self.queue, self.images = WaitingQueue(most_waiting), Images(chat, is_fetching)
        self.batches = Batches(chat, batch_size)
        self.started = int(time.time())
        self._num_bytes = 0  # reserved by `room`

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
        handlers[HTTPException] = _on_http_error
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        # a redirect would be sent before `admit` is asked, to any host that the request names
        app.router.redirect_slashes = False
        return app

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.batches.close)

    def admit(self, scope: Scope) -> None:
        """Raise Refusal unless a request is addressed to this server and has the right API key."""
        headers = Headers(scope=scope)
        self.hosts.check(headers)
        if self.api_key is None:
            return
        # Wrong keys are not counted, as wrong passwords of the page are: behind a proxy all clients have one address, so
        # that a stranger could lock out everybody. A long key cannot be guessed.
        scheme, key = headers.get("authorization", "").partition(" ")[::2]
        is_right = hmac.compare_digest(key.strip().encode("latin-1"), self.api_key.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise Refusal(401, "wrong API key: send Authorization: Bearer KEY")

    async def health(self, request: Request) -> JSONResponse:
        """Report that the server is up; this needs no key."""
        self.hosts.check(request.headers)
        return JSONResponse({"status": "ok", "waiting": len(self.queue)}, headers=SECURITY_HEADERS)

    async def models(self, request: Request) -> JSONResponse:
        """Return the list of models, which holds one, or the model that the path names."""
        self.admit(request.scope)
        model = {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "minigpt4",
        }
        if name := request.path_params.get("name"):
            self.check_model(name)
            return JSONResponse(model, headers=SECURITY_HEADERS)
        return JSONResponse({"object": "list", "data": [model]}, headers=SECURITY_HEADERS)

    def check_model(self, name: str) -> None:
        """Raise Refusal for the name of another model."""
        if name != self.name:
            raise Refusal(
                404, f"the model {name[:100]!r} does not exist; this server has {self.name!r}"
            )

    @contextmanager
    def room(self, num_bytes: int) -> Iterator[None]:
        """Reserve memory for a request while the context lasts. Raises Refusal if all together have too much."""
        if self._num_bytes + num_bytes > MOST_BYTES_ALL:
            raise Refusal(429, "too many large requests at once: try again in a moment")
        self._num_bytes += num_bytes
        try:
            yield
        finally:
            self._num_bytes -= num_bytes


class Completions:
    """POST /v1/chat/completions. It is an ASGI application, which can see when the client disconnects."""

    def __init__(self, api: OpenAI):
        self.api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, until the client disconnects. Raises errors, which `_on_error` answers."""
        api, headers = self.api, Headers(scope=scope)
        unread = Body(receive, headers)
        with ExitStack() as place, ExitStack() as room:
            try:
                api.admit(scope)
                place.enter_context(api.queue.place())
                length = int(headers.get("content-length", MOST_BYTES))
                room.enter_context(api.room(min(length, MOST_BYTES)))
                receive = await asyncio.wait_for(unread.read(MOST_BYTES), READ_S)
            except asyncio.TimeoutError:
                raise Refusal(408, f"the request did not come within {READ_S} s") from None
            except (Refusal, QueueFullError):
                await unread.discard()
                raise
            body = await Request(scope, receive).body()
            work = asyncio.ensure_future(self._answer(body, room, place, scope, send))
            del body  # `_answer` frees it as soon as it can
            # whichever comes first: the end of the answer, or of the connection
            disconnect = asyncio.ensure_future(_disconnected(receive))
            try:
                await asyncio.wait({work, disconnect}, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    work.result()
            finally:
                work.cancel()
                disconnect.cancel()
                await asyncio.gather(work, disconnect, return_exceptions=True)

    async def _answer(
        self, body: bytes, room: ExitStack, place: ExitStack, scope: Scope, send: Send
    ) -> None:
        """Answer a request; its body is freed and `room` released before it waits for the model.

        `place` holds until the end what its images take.
        """
        request = await asyncio.to_thread(ChatRequest.read, body)
        self.api.check_model(request.model)
        job = await self._job(request, place)
        is_streamed, options = request.stream, request.stream_options
        has_usage = options is not None and bool(options.include_usage)
        del body, request  # they hold whole images
        room.close()
        self.api.batches.add(job)
        try:
            async with aclosing(job.pieces()) as pieces:
                # up to the first piece an error still decides the HTTP status
                first = await anext(pieces, None)
                if is_streamed:
                    events = self._events(job, has_usage, first, pieces)
                    response = StreamingResponse(
                        events, headers=STREAM_HEADERS, media_type="text/event-stream"
                    )
                else:
                    completion = self._completion(job, first, [piece async for piece in pieces])
                    response = JSONResponse(completion, headers=SECURITY_HEADERS)
                await response(scope, _never, send)
        finally:
            job.stop.set()

    async def _job(self, request: ChatRequest, place: ExitStack) -> Job:
        """Return the job of a request, its images read, and room for them in `place`.

        Raises Refusal, ValueError or OSError for an invalid request.
        """
        settings = request.settings(self.api.defaults)
        conv = await asyncio.to_thread(request.conversation, self.api.chat, self.api.template)
        images, num_bytes = [], 0
        for url in request.image_urls:
            images.append(await self.api.images.read(url))
            # as pixels an image can take a thousand times as much as in the request
            size = images[-1].values.nbytes
            num_bytes += size
            if num_bytes > MOST_BYTES_ALL:
                raise Refusal(413, "too many images for one request: send fewer")
            place.enter_context(self.api.room(size))
        return Job(conv, images, settings)

    def _completion(self, job: Job, first: str | None, pieces: list[str]) -> dict[str, object]:
        """Return the body of an answer that is not streamed."""
        message = {"role": "assistant", "content": (first or "") + "".join(pieces)}
        reason = finish_reason(job)
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        rest = {"choices": [choice], "usage": usage(job)}
        return self._head("chat.completion") | rest | notices(job)

    async def _events(
        self, job: Job, has_usage: bool, first: str | None, pieces: AsyncIterator[str]
    ) -> AsyncIterator[str]:
        """Yield server-sent events: a chunk for each piece, one with the finish reason, the usage if asked for, [DONE]."""
        head = self._head("chat.completion.chunk")

        def chunk(delta: dict[str, str], reason: str | None = None, **more: object) -> str:
            choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]
            return sse_event(head | {"choices": choices} | more)

        yield chunk({"role": "assistant", "content": first or ""})
        try:
            async for piece in pieces:
                yield chunk({"content": piece})
        except Exception as error:
            yield sse_event(error_response(error)[1])
            return
        yield chunk({}, finish_reason(job), **notices(job))
        if has_usage:
            yield sse_event(head | {"choices": [], "usage": usage(job)})
        yield "data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, object]:
        identity = f"chatcmpl-{uuid.uuid4().hex}"
        return {"id": identity, "object": kind, "created": int(time.time()), "model": self.api.name}


async def _disconnected(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _never() -> dict:
    """Stand in for `receive`, which `_disconnected` already reads."""
    return await asyncio.get_running_loop().create_future()


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    status, body = error_response(error)
    # the connection is closed, since there may be more of the request
    return JSONResponse(body, status, headers={**SECURITY_HEADERS, "connection": "close"})


async def _on_http_error(request: Request, error: HTTPException) -> JSONResponse:
    await Body(request.receive, request.headers).discard()
    message = f"{request.method} {request.url.path}: {error.detail}"
    return await _on_error(request, Refusal(error.status_code, message))
