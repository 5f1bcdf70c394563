"""Fits a dialogue into the LLM's context: the oldest turns are left out first, every image stays."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from minigpt4.conversation.context import Context, TooLongError
from minigpt4.conversation.sampling import Request
from minigpt4.text.encoder import PromptEncoder
from minigpt4.text.rows import context_ids

if TYPE_CHECKING:  # conversation.py imports chat.py, which imports this module
    from minigpt4.conversation.conversation import Conversation


def prompt_ids(
    conv: "Conversation", images: Sequence[Tensor], encoder: PromptEncoder
) -> tuple[int, ...]:
    """Return the token ids of the whole prompt; `images` are embeddings, [1, Q, D] each."""
    sizes = [image.shape[1] for image in images]
    return tuple(context_ids(conv.segments(), encoder, sizes))


def fitted_context(
    conv: "Conversation",
    images: tuple[Tensor, ...],
    encoder: PromptEncoder,
    max_positions: int | None,
    request: Request,
) -> Context:
    """Return the Context for the answer to a dialogue that ends with a question; on_notice hears what is left out.

    `max_positions` is the LLM's own limit, None if it has none. Raises ValueError for an answer so long that no question
    fits, TooLongError for a question that does not fit.
    """
    max_length, max_new_tokens = request.sampling.max_length, request.sampling.max_new_tokens
    limit = min(max_length, max_positions or max_length)
    room = limit - max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_new_tokens: {max_new_tokens} leaves no room for a question in {limit} tokens"
        )

    def prompt_of(conv: "Conversation") -> Sequence[int]:
        # if the number of characters alone shows that it is too long, it is not tokenised
        least_length = conv.num_chars // encoder.longest_token
        if least_length > limit:
            return range(least_length)
        conv = conv.copy()
        conv.append_message(conv.roles[1], None)
        return prompt_ids(conv, images, encoder)

    # leave out the oldest turns; if the last question alone is too long, shorten its answer
    prompt, num_left_out = prompt_of(conv), 0
    if len(prompt) > room:
        shorter, num_left_out = conv.shortened(lambda conv: len(prompt_of(conv)) <= room)
        prompt = prompt_of(shorter)
    if len(prompt) >= limit:
        raise TooLongError(
            f"question and images take {len(prompt)} tokens of {limit}: shorten the question"
        )
    if num_left_out:
        left_out = f"the {num_left_out} oldest question(s) are left out, images stay"
        request.on_notice(f"more than {room} tokens: {left_out}")
    left = limit - len(prompt)
    if len(prompt) > room:
        request.on_notice(f"question and images leave room for {left} tokens of an answer only")
    return Context(prompt, images, conv.template.stop, min(max_new_tokens, left))
