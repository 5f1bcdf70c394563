"""Keys and values that outlive an answer, for the next prompt that begins as the last one did."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from minigpt4.conversation.context import Context

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import DynamicCache


class PrefixCache:
    """Keys and values of a conversation's last prompt and answer; hand it to each of its turns.

    What the next prompt has in common with it, position by position, is not computed again. The
    content is taken out while it is in use: two answers at once are only slower, never wrong.
    """

    def __init__(self):
        self._content = None

    @property
    def num_positions(self) -> int:
        """How many positions are kept."""
        content = self._content
        return 0 if content is None else len(content[1])

    def common(self, context: Context) -> int:
        """Return how many leading positions of `context` are kept."""
        return self._common(self._content, context)

    def take(self, context: Context) -> tuple["DynamicCache | None", int]:
        """Return (keys and values or None, how many leading positions of `context` they cover)."""
        content, self._content = self._content, None
        common = self._common(content, context)
        if not common:
            return None, 0
        past = content[0]
        excess = past.get_seq_length() - common
        if excess:
            past.crop(-excess)
        return past, common

    @staticmethod
    def _common(content: tuple | None, context: Context) -> int:
        # a sliding window has forgotten what it would need
        if content is None or any(getattr(content[0], "is_sliding", ())):
            return 0
        # one position at least is computed, for its logits
        return min(context.common_prefix(*content[1:]), len(context.ids) - 1)

    def put(self, past: "DynamicCache", context: Context, new_ids: Sequence[int]) -> None:
        """Keep `past`, which covers `context` and all or some of the tokens written after it.

        A pass that was broken off leaves layers of unequal length: then nothing is kept.
        """
        parts = [layer.keys for layer in past.layers] + [layer.values for layer in past.layers]
        if any(part is None for part in parts) or len({part.shape[-2] for part in parts}) > 1:
            return
        ids = (*context.ids, *new_ids)[: past.get_seq_length()]
        self._content = past, ids, context.images


class PrefixCaches:
    """The PrefixCaches of the last conversations, found again by what they hold.

    At 7B and 2,000 tokens each of the `most` takes 1 GB.
    """

    def __init__(self, most: int = 4):
        self.most, self._caches = most, []

    def best(self, context: Context) -> PrefixCache:
        """Return the cache to use for `context`: a new one unless one shares most of what it holds with it."""
        held = [cache for cache in self._caches if cache.num_positions]
        best = max(held, key=lambda cache: cache.common(context), default=PrefixCache())
        if 2 * best.common(context) <= best.num_positions:
            best = PrefixCache()
        # the latest last
        self._caches = [*(cache for cache in held if cache is not best), best][-self.most :]
        return best
