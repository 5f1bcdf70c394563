"""Segments -> token ids, with the tokenizer of the LLM."""

import re
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, groupby
from typing import NamedTuple

from minigpt4.text.segments import IMAGE, ImageSlot, Segment

# `split_special_tokens` is a switch on the tokenizer, which all threads share
_switching = threading.Lock()


class Piece(NamedTuple):
    """What is encoded in one go: a stretch of text, the id of a special token, or IMAGE."""

    content: str | int | ImageSlot
    is_target: bool


class PromptEncoder:
    """Encodes segments; one for each tokenizer, safe to use from several threads."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Token text -> id of every special token."""
        return {token.content: index for index, token in self._special_tokens.items()}

    @cached_property
    def longest_token(self) -> int:
        """The most characters that one token stands for."""
        return max(map(len, self.tokenizer.get_vocab()), default=1)

    @property
    def bos(self) -> list[int]:
        """What every sequence begins with: the id of BOS; nothing for a tokenizer without one."""
        bos = self.tokenizer.bos_token_id
        return [] if bos is None else [bos]

    def encode(self, segments: Sequence[Segment]) -> list[list[int] | ImageSlot]:
        """Return lists of token ids with IMAGE between them; the first list begins with BOS, if there is one."""
        result = [self.bos]
        for content, _ in self.encode_batch([segments])[0]:
            if content is IMAGE:
                result += [IMAGE, []]
            else:
                result[-1] += content
        return result

    def encode_batch(
        self, batch: Sequence[Sequence[Segment]]
    ) -> list[list[tuple[list[int] | ImageSlot, bool]]]:
        """Return, for each list of segments, its parts (token ids or IMAGE, whether they are a target), without BOS.

        Text between two images, special tokens or borders of a target is tokenised in one go: words may merge across
        segments.
        """
        rows = [list(self._pieces(segments)) for segments in batch]
        # each text once, all in one call: prompts come again and again
        ids_of = self._tokenize({piece.content for piece in chain.from_iterable(rows)})
        result = []
        for row in rows:
            result.append([(ids_of.get(content, content), is_target) for content, is_target in row])
        return result

    def _tokenize(self, contents: set[str | int | ImageSlot]) -> dict[str | int, list[int]]:
        """Return the token ids of texts and of special tokens."""
        ids_of = {content: [content] for content in contents if isinstance(content, int)}
        texts = [content for content in contents if isinstance(content, str)]
        if texts:
            # half of a surrogate pair, on which tokenizers fail, becomes U+FFFD
            sound = [
                text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts
            ]
            with _switching:
                encoded = self.tokenizer(
                    sound, add_special_tokens=False, split_special_tokens=True, verbose=False
                )
            ids_of.update(zip(texts, encoded.input_ids, strict=True))
        return ids_of

    def _pieces(self, segments: Sequence[Segment]) -> Iterator[Piece]:
        """Yield the segments' pieces; neighbouring stretches of text with and without target stay apart."""

        def kind(atom: Piece) -> tuple[bool, bool]:
            return isinstance(atom.content, str), atom.is_target

        for (is_text, is_target), group in groupby(self._atoms(segments), key=kind):
            if not is_text:
                yield from group
            elif text := "".join(atom.content for atom in group):
                yield Piece(text, is_target)

    def _atoms(self, segments: Sequence[Segment]) -> Iterator[Piece]:
        """Yield IMAGE, plain strings, and the ids of the special tokens that structure names."""
        for segment in segments:
            if segment is IMAGE:
                yield Piece(IMAGE, False)
            elif segment.is_structure:
                for content in self._split_at_special_tokens(segment.text):
                    yield Piece(content, segment.is_target)
            else:
                yield Piece(segment.text, segment.is_target)

    def _split_at_special_tokens(self, text: str) -> list[str | int]:
        """Return `text` cut at special tokens; those that swallow the spaces beside them (LLaMA's) do so here, too."""
        parts: list[str | int] = self._special_pattern.split(text)
        # a split by a group gives text, special token, text, ..
        for index in range(1, len(parts), 2):
            parts[index] = self.special_ids[parts[index]]
            token = self._special_tokens[parts[index]]
            if token.lstrip:
                parts[index - 1] = parts[index - 1].rstrip()
            if token.rstrip:
                parts[index + 1] = parts[index + 1].lstrip()
        return parts

    @cached_property
    def _special_tokens(self) -> dict:
        return {
            index: token
            for index, token in self.tokenizer.added_tokens_decoder.items()
            if token.special
        }

    @cached_property
    def _special_pattern(self) -> re.Pattern:
        # longest first, so that a token that begins like another one is found; no special tokens: match nothing
        names = sorted(self.special_ids, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, names)) + ")" if names else "((?!))")
