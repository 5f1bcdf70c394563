"""Ranking of candidate answers: which of them does the model find most likely?

losses = candidate_losses(chat, conv, [Item("1", ["cat.jpg"], "What is it?", ["a cat", "a dog"])])["1"]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from minigpt4.evaluation.items import EncodedItem, Item, encoded_batches

if TYPE_CHECKING:
    from minigpt4.conversation.answer_losses import AnswerLoss
    from minigpt4.conversation.conversation import Chat, Conversation

# The number that is compared, by rule; lower is better. "release" follows `multi_select` of MiniGPT-4's newest release,
# which divides by the length of the longest text in the batch, so that its ranking depends on what else is asked.
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
    """Return, by id, the loss of each of the item's options; the option with the least loss is the best answer.

    The prompt is the one used for generated answers; each image is encoded once. A loss is the sum over the tokens of
    the option and its end symbol, divided as RULES say, and depends on no other item or option. Raises ValueError for
    an unknown rule, an image that cannot be read, and a text that is too long for the LLM.
    """
    check_rule(rule)
    found = {}
    for batch, errors in encoded_batches(chat, conv, items, batch_size):
        if errors:
            raise ValueError(f"item '{errors[0][0]}': {errors[0][1]}")
        for encoded, losses in zip(batch, losses_of(chat, batch, rule), strict=True):
            found[encoded.item.id] = losses
    return found


def losses_of(chat: Chat, batch: Sequence[EncodedItem], rule: str) -> list[list[float]]:
    """Return the losses of each item's options, as `candidate_losses` does, for items with encoded images."""
    from minigpt4.conversation.answer_losses import answer_losses

    convs = [encoded.conv for encoded in batch]
    embeds = [encoded.embeds for encoded in batch]
    options = [encoded.item.options for encoded in batch]
    found = answer_losses(chat, convs, embeds, options)
    return [list(map(RULES[rule], losses)) for losses in found]
