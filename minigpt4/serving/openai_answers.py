"""What clients of the OpenAI API are told, in OpenAI's shape: events, why an answer ended, counts, notices, errors."""

import json

from minigpt4.conversation.context import TooLongError
from minigpt4.serving.limits import Refusal
from minigpt4.serving.openai_batches import Job

TYPES = {
    401: "authentication_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
}


def event(data: dict[str, object]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(data)}\n\n"


def finish_reason(job: Job) -> str:
    """Return why an answer ended: by itself, or because it was long enough."""
    return "stop" if job.is_complete else "length"


def usage(job: Job) -> dict[str, object]:
    """Return the counts of tokens; an image counts as the vectors that the LLM reads of it."""
    prompt, answer = len(job.context.ids), len(job.answer.ids)
    details = {"prompt_tokens_details": {"cached_tokens": job.num_cached}}
    counts = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    return counts | details


def notices(job: Job) -> dict[str, list[str]]:
    """Return what the client should know, such as turns that were left out; nothing if there is nothing."""
    return {"notices": job.notices} if job.notices else {}


def refused(error: Exception) -> tuple[int, dict[str, object]]:
    """Return the status and the body by which a client is told an error."""
    known = isinstance(error, (Refusal, ValueError, OSError))
    status = getattr(error, "status", 400) if known else 500
    message = str(error) if known else f"{type(error).__name__}; the server's output says more"
    code = "context_length_exceeded" if isinstance(error, TooLongError) else _code(status)
    kind = TYPES.get(status, "invalid_request_error")
    return status, {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _code(status: int) -> str | None:
    return {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded"}.get(status)
