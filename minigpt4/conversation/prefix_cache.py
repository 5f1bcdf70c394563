"""KV caches that are kept after an answer, for the next prompt that begins like the last one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from minigpt4.conversation.context import Context

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import DynamicCache


class PrefixCache:
    """The KV cache of a conversation's last prompt and answer; pass it with each of its turns.

    The positions that the next prompt has in common with it, from the start, are not computed again.
    `take` removes the content while it is in use: two answers at once are only slower, never wrong.
    """

    def __init__(self):
        self._content = None  # (KV cache, its ids, its images)

    @property
    def num_positions(self) -> int:
        """The number of positions that are cached."""
        content = self._content
        return 0 if content is None else len(content[1])

    def common(self, context: Context) -> int:
        """Return how many leading positions of `context` are cached."""
        return self._num_common(self._content, context)

    def take(self, context: Context) -> tuple["DynamicCache | None", int]:
        """Return (KV cache or None, how many leading positions of `context` it covers)."""
        content, self._content = self._content, None
        common = self._num_common(content, context)
        if not common:
            return None, 0
        past = content[0]
        excess = past.get_seq_length() - common
        if excess:
            past.crop(-excess)
        return past, common

    @staticmethod
    def _num_common(content: tuple | None, context: Context) -> int:
        # layers with a sliding window no longer hold the first positions
        if content is None or any(getattr(content[0], "is_sliding", ())):
            return 0
        # at least one position is computed, for its logits
        return min(context.common_prefix(*content[1:]), len(context.ids) - 1)

    def put(self, past: "DynamicCache", context: Context, new_ids: Sequence[int]) -> None:
        """Keep `past`, which covers `context` and all or some of the tokens written after it.

        An interrupted forward pass leaves layers of unequal length: then nothing is kept.
        """
        parts = [layer.keys for layer in past.layers] + [layer.values for layer in past.layers]
        if any(part is None for part in parts) or len({part.shape[-2] for part in parts}) > 1:
            return
        ids = (*context.ids, *new_ids)[: past.get_seq_length()]
        self._content = past, ids, context.images


class PrefixCaches:
    """The PrefixCaches of the latest conversations, found by the prefix that they share with a prompt.

    With a 7B LLM and 2,000 tokens each of the at most `most` takes 1 GB.
    """

    def __init__(self, most: int = 4):
        self.most, self._caches = most, []

    def best(self, context: Context) -> PrefixCache:
        """Return the cache with the longest prefix of `context`; a new one if that is at most half of what it holds."""
        held = [cache for cache in self._caches if cache.num_positions]
        best = max(held, key=lambda cache: cache.common(context), default=PrefixCache())
        if 2 * best.common(context) <= best.num_positions:
            best = PrefixCache()
        # the most recently used last
        self._caches = [*(cache for cache in held if cache is not best), best][-self.most :]
        return best
