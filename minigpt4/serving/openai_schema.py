"""Requests to the OpenAI API: checked, and turned into a Conversation, its images and the settings of the answer."""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from minigpt4.conversation.chat import Chat
from minigpt4.conversation.conversation import Conversation
from minigpt4.conversation.message import Message, check_length, check_question
from minigpt4.conversation.sampling import TINY, Sampling
from minigpt4.serving.answers import SETTINGS
from minigpt4.serving.session import DEFAULT_QUESTION, MAX_IMAGES
from minigpt4.text.segments import IMAGE, message_segments

MOST_MESSAGES, MOST_IMAGES = 500, 64  # of a dialogue
MOST_STOPS, MOST_STOP_CHARS = 4, 100
# fields that do not affect the answer
IGNORED = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
}
# unsupported fields, accepted only with a value that has no effect
NEUTRAL = {
    "best_of": [1],
    "frequency_penalty": [0],
    "function_call": ["none", "auto"],  # there are no functions and no tools
    "functions": [[]],
    "length_penalty": [1],
    "logit_bias": [{}],
    "logprobs": [False],
    "min_p": [0],
    "modalities": [["text"]],
    "n": [1],
    "parallel_tool_calls": [True, False],
    "presence_penalty": [0],
    "response_format": [{"type": "text"}],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "top_logprobs": [0],
}
# values by which clients ask for no limit, the least or a random one -> what Sampling takes for it
CUSTOMARY = {("max_new_tokens", -1): 2**31, ("top_k", -1): 0, ("top_p", 0): TINY}
CUSTOMARY |= {("seed", -1): None}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class ImageUrl(_Strict):
    """The URL of an image; `detail` is ignored, since the model has one image size."""

    url: str
    detail: str | None = None


class TextPart(_Strict):
    """Text of a message; a marker typed in it stays plain text."""

    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(_Strict):
    """One message of the dialogue."""

    role: Literal["system", "developer", "user", "assistant"]
    parts: list[Annotated[TextPart | ImagePart, Field(discriminator="type")]] = Field(
        validation_alias="content"
    )

    @field_validator("parts", mode="before")
    @classmethod
    def _from_text(cls, content: object, info: ValidationInfo) -> object:
        """Return a content as a list of parts, also if it is one string; an assistant's may be null."""
        if content is None and info.data.get("role") == "assistant":
            content = ""
        if not isinstance(content, (str, list)):
            raise PydanticCustomError("content", "expected text or a list of parts")
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def text(self) -> str:
        """The text parts, joined by newlines."""
        return "\n".join(part.text for part in self.parts if isinstance(part, TextPart))


class StreamOptions(_Strict):
    """What a stream holds in addition to the answer."""

    include_usage: bool | None = None


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions. `top_k` and `repetition_penalty` are our additions to OpenAI's."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: list[str] = []
    max_tokens: float | None = None
    max_completion_tokens: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _from_one(cls, stop: object) -> object:
        """Return the strings that end an answer as a list, also if it is one or none."""
        if stop is None:
            return []
        return [stop] if isinstance(stop, str) else stop

    @classmethod
    def read(cls, body: bytes) -> "ChatRequest":
        """Return the request of a body. Raises ValueError that names the first wrong field."""
        try:
            request = cls.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{where or 'the request'}: {first['msg']}") from None
        for name, value in request.model_extra.items():
            if name not in IGNORED and value is not None and value not in NEUTRAL.get(name, []):
                raise ValueError(
                    f"{name[:40]}: {str(value)[:40]} is not supported by this server: leave it out"
                )
        return request

    def settings(self, defaults: dict[str, float]) -> dict[str, float | None]:
        """Return fields of Sampling; those that are not given come from `defaults`, else from the page.

        An answer may be longer than there is room: Batches shortens it. Raises ValueError for a value out of bounds.
        """
        length = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        fields = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "repetition_penalty": self.repetition_penalty,
            "max_new_tokens": getattr(self, length),
            "seed": self.seed,
        }
        # the model has a repetition penalty of its own
        first = {name: SETTINGS[name].first for name in fields if name != "repetition_penalty"}
        given = {name: value for name, value in fields.items() if value is not None}
        settings = first | defaults | given
        settings = {name: CUSTOMARY.get((name, value), value) for name, value in settings.items()}
        try:
            sampling = Sampling(**settings)
        except ValueError as error:
            raise ValueError(str(error).replace("max_new_tokens", length)) from error
        return {name: getattr(sampling, name) for name in settings}

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end an answer, in addition to the template's. Raises ValueError for too many or too long ones."""
        if len(self.stop) > MOST_STOPS or not all(
            0 < len(stop) <= MOST_STOP_CHARS for stop in self.stop
        ):
            raise ValueError(
                f"stop: expected at most {MOST_STOPS} strings of 1 to {MOST_STOP_CHARS} characters"
            )
        return tuple(self.stop)

    @property
    def image_urls(self) -> list[str]:
        """The URLs of the images, in the order of the dialogue. Raises ValueError for too many."""
        urls = []
        for message in self.messages:
            urls += [part.image_url.url for part in message.parts if isinstance(part, ImagePart)]
        if len(urls) > MOST_IMAGES:
            raise ValueError(f"messages: {len(urls)} images; at most {MOST_IMAGES} in a dialogue")
        return urls

    def conversation(self, chat: Chat, empty: Conversation) -> Conversation:
        """Return the dialogue, in the template of `empty`. Raises ValueError that names a wrong message."""
        conv = empty.copy()
        conv.template = replace(
            conv.template, stop=tuple(dict.fromkeys((*conv.template.stop, *self.stops)))
        )
        system = [
            message.text for message in self.messages if message.role in ("system", "developer")
        ]
        if system:
            text = "\n".join(system)
            check_length(text, "messages: the system message")
            conv.template = replace(conv.template.with_system(text), is_system_typed=True)
        for number, message in enumerate(self.messages):
            try:
                _append(message, chat, conv)
            except ValueError as error:
                raise ValueError(f"messages.{number}: {error}") from error
        if self.messages[-1].role != "user":
            raise ValueError("messages: the last one must be the user's")
        return conv


def _append(message: ChatMessage, chat: Chat, conv: Conversation) -> None:
    """Append a message: images first as `Chat.upload_img` does, unless they stand between texts."""
    parts = [part for part in message.parts if isinstance(part, ImagePart) or part.text.strip()]
    is_image = [isinstance(part, ImagePart) for part in parts]
    text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
    if message.role != "user":
        if any(is_image):
            raise ValueError(f"images of the {message.role} are not supported: only the user's")
        if message.role == "assistant":
            check_length(message.text)
            conv.append_message(conv.roles[1], message.text)
        return
    if sum(is_image) > MAX_IMAGES:
        raise ValueError(f"{sum(is_image)} images in one message; at most {MAX_IMAGES}")
    question = text or DEFAULT_QUESTION if any(is_image) else text
    check_question(question)
    # the order of training, also for clients that send the text first
    if is_image in (sorted(is_image), sorted(is_image, reverse=True)):
        for _ in range(sum(is_image)):
            conv.append_image()
        chat.ask(question, conv)
    else:
        contents = [IMAGE if isinstance(part, ImagePart) else part.text for part in parts]
        conv.append_message(conv.roles[0], Message(message_segments(contents)))
