"""Answers to several contexts at once, token by token, for those who schedule them."""

import logging
from collections.abc import Iterator, Sequence
from threading import Event
from typing import Any

import torch

from minigpt4.conversation.chat import Chat
from minigpt4.conversation.context import Context
from minigpt4.conversation.prefix_cache import PrefixCache
from minigpt4.conversation.sampling import Request, Sampling

logger = logging.getLogger(__name__)


def decode_contexts(
    chat: Chat,
    contexts: Sequence[Context],
    cache: PrefixCache | None = None,
    stop_events: Sequence[Event] = (),
    **sampling: Any,
) -> Iterator[list[tuple[int, int]]]:
    """Yield steps, lists of (row, token id), of the answers to `contexts` until all have ended.

    `Chat.answer_prepare` gives a context, `sampling` are fields of Sampling. `cache` is for one row; `stop_events`: one
    a row, which ends that row with the token being computed. Raises ValueError for contexts that end differently.
    """
    return chat._decode(
        contexts, Request(Sampling(**sampling), logger.warning, cache, None, stop_events)
    )


def is_complete(chat: Chat, context: Context, ids: Sequence[int]) -> bool:
    """Return whether an answer's token ids end with an end token or a stop string: not by their number."""
    stop_rule = chat._stop_rule(context, Request(Sampling(), logger.warning))
    return len(ids) > 0 and bool(stop_rule(torch.tensor([list(ids)])))
