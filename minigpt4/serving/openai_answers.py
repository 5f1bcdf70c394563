"""Parts of responses in the format of the OpenAI API: events, finish reasons, usage, notices, errors."""

import json

from minigpt4.conversation.context import TooLongError
from minigpt4.serving.limits import Refusal
from minigpt4.serving.openai_batches import Job

ERROR_TYPES = {  # HTTP status -> type; all others are "invalid_request_error"
    401: "authentication_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
}


def sse_event(data: dict[str, object]) -> str:
    """Return a server-sent event with `data` as JSON."""
    return f"data: {json.dumps(data)}\n\n"


def finish_reason(job: Job) -> str:
    """Return why an answer ended: by itself ("stop"), or at its maximum length ("length")."""
    return "stop" if job.is_complete else "length"


def usage(job: Job) -> dict[str, object]:
    """Return the numbers of tokens; an image counts as its embeddings, which the LLM reads like tokens."""
    prompt, answer = len(job.context.ids), len(job.answer.ids)
    details = {"prompt_tokens_details": {"cached_tokens": job.num_cached}}
    counts = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    return counts | details


def notices(job: Job) -> dict[str, list[str]]:
    """Return the field for notices to the client, such as of turns that were left out; {} if there are none."""
    return {"notices": job.notices} if job.notices else {}


def error_response(error: Exception) -> tuple[int, dict[str, object]]:
    """Return (HTTP status, body) for an error; an unexpected one is reported without its details."""
    known = isinstance(error, (Refusal, ValueError, OSError))
    status = getattr(error, "status", 400) if known else 500
    message = str(error) if known else f"{type(error).__name__}; the server's output says more"
    code = "context_length_exceeded" if isinstance(error, TooLongError) else _code(status)
    kind = ERROR_TYPES.get(status, "invalid_request_error")
    return status, {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _code(status: int) -> str | None:
    return {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}.get(status)
