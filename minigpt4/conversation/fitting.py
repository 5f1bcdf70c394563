"""Fits a dialogue into the LLM's context: the oldest turns are left out first, then the oldest images."""

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

    def images_of(conv: "Conversation") -> tuple[Tensor, ...]:
        return images[len(images) - conv.num_images :]

    def prompt_of(conv: "Conversation") -> Sequence[int]:
        # if the number of characters alone shows that it is too long, it is not tokenised
        least_length = conv.num_chars // encoder.longest_token
        if least_length > limit:
            return range(least_length)
        opened = conv.copy()
        opened.append_message(conv.roles[1], None)
        return prompt_ids(opened, images_of(conv), encoder)

    prompt, shorter = prompt_of(conv), conv
    num_questions, num_images = 0, 0
    if len(prompt) > room:
        shorter, num_questions = conv.shortened(lambda conv: len(prompt_of(conv)) <= room)
        prompt = prompt_of(shorter)
    # images are left out only where they leave too little of the context for an answer
    most = limit - min(max_new_tokens, limit // 4)
    if len(prompt) > most:
        shorter, num_images = conv.with_fewer_images(lambda conv: len(prompt_of(conv)) <= most)
        prompt = prompt_of(shorter)
    kept = images_of(shorter)
    if len(prompt) >= limit:
        raise _too_long(len(prompt), limit, kept)
    if num_questions:
        images_too = f"and the {num_images} oldest image(s)" if num_images else "images stay"
        left_out = f"the {num_questions} oldest question(s) are left out, {images_too}"
        request.on_notice(f"more than {room} tokens: {left_out}")
    left = limit - len(prompt)
    if len(prompt) > room:
        request.on_notice(f"question and images leave room for {left} tokens of an answer only")
    return Context(prompt, kept, conv.template.stop, min(max_new_tokens, left))


def _too_long(length: int, limit: int, images: Sequence[Tensor]) -> TooLongError:
    advice = "shorten the question"
    if images:
        num_tokens = sum(image.shape[1] for image in images)
        advice += f" or show fewer images ({len(images)} take {num_tokens} tokens)"
    return TooLongError(f"question and images take {length} tokens of {limit}: {advice}")
