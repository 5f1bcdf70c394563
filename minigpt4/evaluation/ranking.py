"""Ranking of candidates: which of several answers does the model find likeliest?

losses = candidate_losses(chat, conv, [Item("1", ["cat.jpg"], "What is it?", ["a cat", "a dog"])])["1"]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from minigpt4.evaluation.items import Asked, Item, encoded_batches

if TYPE_CHECKING:
    from minigpt4.conversation.answer_losses import AnswerLoss
    from minigpt4.conversation.conversation import Chat, Conversation

# what is compared, lower is better. Source of "release": `multi_select` of MiniGPT-4's newest release; there the length
# is that of the longest text of the batch, so that its ranks change with what else is asked
RULES: dict[str, Callable[[AnswerLoss], float]] = {
    "release": lambda loss: loss.total / (loss.num_positions - 1),
    "mean": lambda loss: loss.total / loss.num_tokens,
    "sum": lambda loss: loss.total,
}


def check_rule(rule: str) -> None:
    """Raise ValueError unless `rule` is one of RULES."""
    if rule not in RULES:
        raise ValueError(f"ranking: unknown rule '{rule}'; known: {', '.join(RULES)}")


def candidate_losses(
    chat: Chat,
    conv: Conversation,
    items: Sequence[Item],
    rule: str = "release",
    batch_size: int = 8,
) -> dict[str, list[float]]:
    """Return by id the loss of each of the item's options, the least of which is the best answer.

    The prompt is that of generated answers; an image is encoded once. A loss is the sum over the tokens of the option
    and its end symbol, divided as RULES say, and depends on no other item or option. Raises ValueError for an unknown
    rule, an image that cannot be read, and what the LLM has no room for.
    """
    check_rule(rule)
    found = {}
    for batch, errors in encoded_batches(chat, conv, items, batch_size):
        if errors:
            raise ValueError(f"item '{errors[0][0]}': {errors[0][1]}")
        found |= dict(
            zip((asked.item.id for asked in batch), losses_of(chat, batch, rule), strict=True)
        )
    return found


def losses_of(chat: Chat, batch: Sequence[Asked], rule: str) -> list[list[float]]:
    """Return the losses of each item's options, as `candidate_losses`, of items whose images are encoded."""
    from minigpt4.conversation.answer_losses import answer_losses

    convs, embeds = [asked.conv for asked in batch], [asked.embeds for asked in batch]
    found = answer_losses(chat, convs, embeds, [asked.item.options for asked in batch])
    return [list(map(RULES[rule], losses)) for losses in found]
