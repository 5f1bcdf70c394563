"""The text of an answer, complete or while it is being decoded."""

from collections.abc import Sequence


class AnswerText:
    """Turns the tokens of one answer into text as they come, without half characters or parts of stop strings.

    Each call of `safe` is given the ids of the last call and more; only the latest are decoded again.
    """

    WINDOW = 16  # tokens; for each new one at most the last two windows are decoded again

    def __init__(self, tokenizer, stop: Sequence[str]):
        self.tokenizer, self.stop = tokenizer, stop
        self._shown = ""  # the last result of `safe`
        self._settled = ""  # the text of ids[:_start]
        self._previous = self._start = 0  # where the last two windows begin
        self.ids, self._num_given = [], 0  # tokens that `add` took, characters that it returned
        self.special_ids = {
            index for index, token in tokenizer.added_tokens_decoder.items() if token.special
        }

    def add(self, token: int) -> str:
        """Append the next token; return the new part of `safe`."""
        self.ids.append(token)
        return self._new(self.safe(self.ids))

    def rest(self) -> str:
        """Return the part of `whole` that `add` has not returned."""
        return self._new(self.whole(self.ids))

    def _new(self, text: str) -> str:
        new = text[self._num_given :]
        self._num_given += len(new)
        return new

    def whole(self, ids: Sequence[int]) -> str:
        """Return the text of a finished answer: without special tokens, up to the first stop string, stripped."""
        text = self._decode(ids)
        ends = [text.find(stop) for stop in self.stop if stop in text]
        return text[: min(ends, default=None)].strip()

    def safe(self, ids: Sequence[int]) -> str:
        """Return the beginning of `whole` that no further token can change."""
        text = self._decode_latest(ids)
        if any(stop in text for stop in self.stop):
            return self.whole(ids)
        # the end may become a stop string, or be half a character
        held = max((_overlap(text, stop) for stop in self.stop), default=0)
        text = text[: len(text) - held].rstrip("\ufffd").strip()
        # bytes of an incomplete character can hide the one before it for a while: keep the old text then
        if text.startswith(self._shown):
            self._shown = text
        return self._shown

    def _decode_latest(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; windows overlap, since the first token of a text decodes differently."""
        known = self._decode(ids[self._previous : self._start])
        text = self._decode(ids[self._previous :])
        if not text.startswith(known):
            return self._settled
        new = text[len(known) :]
        if len(ids) - self._start >= self.WINDOW and not new.endswith("\ufffd"):
            self._previous, self._start = self._start, len(ids)
            self._settled += new
            return self._settled
        return self._settled + new

    def _decode(self, ids: Sequence[int]) -> str:
        # not by skip_special_tokens: tokenizers 0.23 forgets which are special when a normalizer is set
        plain = [index for index in ids if index not in self.special_ids]
        return self.tokenizer.decode(plain, clean_up_tokenization_spaces=False)


def _overlap(text: str, stop: str) -> int:
    """Return how many of the last characters of `text` are the beginning of `stop`."""
    return max((size for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
