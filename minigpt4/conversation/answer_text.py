"""The text of an answer, whole or while its tokens come."""

from collections.abc import Sequence
from functools import partial


class AnswerText:
    """The text of an answer while its tokens come: no half character, no beginning of a stop string.

    For one answer: `safe` is asked about token ids that only ever grow, and decodes what is new.
    """

    WINDOW = 16  # tokens decoded anew for each one that comes

    def __init__(self, tokenizer, stop: Sequence[str]):
        self.tokenizer, self.stop = tokenizer, stop
        self._shown = self._settled = ""
        self._before = self._start = 0  # the text of ids[:start] is settled
        self.ids, self._num_given = [], 0  # of `add`
        self.special_ids = {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }

    def add(self, token: int) -> str:
        """Take the next token; return what of `safe` is new."""
        self.ids.append(token)
        return self._new(self.safe(self.ids))

    def rest(self) -> str:
        """Return what of `whole` no `add` has returned."""
        return self._new(self.whole(self.ids))

    def _new(self, text: str) -> str:
        new = text[self._num_given :]
        self._num_given += len(new)
        return new

    def whole(self, ids: Sequence[int]) -> str:
        """Return a finished answer: without special tokens, up to the first stop string, stripped."""
        text = self._decode(ids)
        return text[
            : min((text.find(stop) for stop in self.stop if stop in text), default=None)
        ].strip()

    def safe(self, ids: Sequence[int]) -> str:
        """Return the beginning of `whole` that no further token can change."""
        text = self._growing(ids)
        if any(stop in text for stop in self.stop):
            return self.whole(ids)
        # the end may become a stop string, or be half a character
        held = max(map(partial(_overlap, text), self.stop), default=0)
        text = text[: len(text) - held].rstrip("\ufffd").strip()
        # else bytes of an open character hide the one before it for a while
        if text.startswith(self._shown):
            self._shown = text
        return self._shown

    def _growing(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; windows overlap, as a text's first token is decoded otherwise."""
        known = self._decode(ids[self._before : self._start])
        text = self._decode(ids[self._before :])
        if not text.startswith(known):
            return self._settled
        new = text[len(known) :]
        if len(ids) - self._start >= self.WINDOW and not new.endswith("\ufffd"):
            self._before, self._start = self._start, len(ids)
            self._settled += new
            return self._settled
        return self._settled + new

    def _decode(self, ids: Sequence[int]) -> str:
        # not by skip_special_tokens: tokenizers 0.23 forgets them when a normalizer is set
        plain = [index for index in ids if index not in self.special_ids]
        return self.tokenizer.decode(plain, clean_up_tokenization_spaces=False)


def _overlap(text: str, stop: str) -> int:
    """Return how many of the last characters of `text` begin `stop`."""
    return max((size for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
