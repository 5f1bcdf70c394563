"""A dialogue fitted into what the LLM can take: the oldest questions go first, every image stays."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from minigpt4.conversation.context import Context, TooLongError
from minigpt4.conversation.sampling import Request
from minigpt4.text.encoder import PromptEncoder
from minigpt4.text.rows import context_ids

if TYPE_CHECKING:  # it imports the chat, which imports this module
    from minigpt4.conversation.conversation import Conversation


def prompt_ids(
    conv: "Conversation", images: Sequence[Tensor], encoder: PromptEncoder
) -> tuple[int, ...]:
    """Return the ids of the prompt as it stands; `images` are embeddings, [1, Q, D] each."""
    sizes = [image.shape[1] for image in images]
    return tuple(context_ids(conv.segments(), encoder, sizes))


def fitted_context(
    conv: "Conversation",
    images: tuple[Tensor, ...],
    encoder: PromptEncoder,
    longest: int | None,
    request: Request,
) -> Context:
    """Return the Context of the answer to a dialogue that ends with a question; says what had to be left out.

    `longest`: the positions that the LLM has, None if it does not say. Raises ValueError for an answer that leaves no
    room, TooLongError for a question that has none.
    """
    # room for the prompt: what the LLM can take, less the answer
    max_length, max_new_tokens = request.sampling.max_length, request.sampling.max_new_tokens
    limit = min(max_length, longest or max_length)
    room = limit - max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens: {max_new_tokens} leaves no room for a question in {limit} tokens"
        )

    def opened(conv: "Conversation") -> Sequence[int]:
        # characters alone may tell that it is too long: then it costs no tokenising
        at_least = conv.num_chars // encoder.longest_token
        if at_least > limit:
            return range(at_least)
        conv = conv.copy()
        conv.append_message(conv.roles[1], None)
        return prompt_ids(conv, images, encoder)

    # the oldest turns go first; a question that is long by itself takes room of its answer
    prompt, num_left_out = opened(conv), 0
    if len(prompt) > room:
        shorter, num_left_out = conv.shortened(lambda conv: len(opened(conv)) <= room)
        prompt = opened(shorter)
    if len(prompt) >= limit:
        raise TooLongError(
            f"question and images take {len(prompt)} tokens of {limit}: shorten the question"
        )
    # what the user should know
    if num_left_out:
        left_out = f"the {num_left_out} oldest question(s) are left out, images stay"
        request.on_notice(f"more than {room} tokens: {left_out}")
    left = limit - len(prompt)
    if len(prompt) > room:
        request.on_notice(f"question and images leave room for {left} tokens of an answer only")
    return Context(prompt, images, conv.template.stop, min(max_new_tokens, left))
