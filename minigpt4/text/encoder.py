"""Segments to token ids, with the tokenizer of the LLM."""

import re
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, groupby
from typing import NamedTuple

from minigpt4.common.utils import whole_text
from minigpt4.text.segments import IMAGE, ImageSlot, Segment

# A call with `split_special_tokens` changes the state of the tokenizer, which all threads share.
_tokenizer_lock = threading.Lock()


class Piece(NamedTuple):
    """A unit of encoding: a stretch of text, the id of a special token, or IMAGE."""

    content: str | int | ImageSlot
    is_target: bool


class PromptEncoder:
    """Encodes segments; one for each tokenizer, safe to use from several threads."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """{text: id} of every special token."""
        return {token.content: index for index, token in self._special_tokens.items()}

    @cached_property
    def longest_token(self) -> int:
        """The length in characters of the longest token of the vocabulary."""
        return max(map(len, self.tokenizer.get_vocab()), default=1)

    @property
    def bos(self) -> list[int]:
        """The beginning of every sequence: [the id of BOS], or [] for a tokenizer without BOS."""
        bos = self.tokenizer.bos_token_id
        return [] if bos is None else [bos]

    def encode(self, segments: Sequence[Segment]) -> list[list[int] | ImageSlot]:
        """Return lists of token ids with IMAGE between them; the first list begins with `bos`."""
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
        """Return, for each list of segments, its parts as (token ids or IMAGE, whether they are a target), without BOS.

        Text between two images, special tokens or borders of a target is tokenised as one string, so tokens may span
        segments.
        """
        rows = [list(self._pieces(segments)) for segments in batch]
        # one call for all, with each text once: prompts are often the same
        ids_of = self._tokenize({piece.content for piece in chain.from_iterable(rows)})
        result = []
        for row in rows:
            result.append([(ids_of.get(content, content), is_target) for content, is_target in row])
        return result

    def _tokenize(self, contents: set[str | int | ImageSlot]) -> dict[str | int, list[int]]:
        """Return {content: its token ids} of texts and special tokens; IMAGE has no entry."""
        ids_of = {content: [content] for content in contents if isinstance(content, int)}
        texts = [content for content in contents if isinstance(content, str)]
        if texts:
            with _tokenizer_lock:
                encoded = self.tokenizer(
                    list(map(whole_text, texts)),  # tokenizers refuse lone surrogates
                    add_special_tokens=False,
                    split_special_tokens=True,
                    verbose=False,
                )
            ids_of.update(zip(texts, encoded.input_ids, strict=True))
        return ids_of

    def _pieces(self, segments: Sequence[Segment]) -> Iterator[Piece]:
        """Yield the pieces of segments: adjacent texts are joined if both or neither are a target."""

        def kind(atom: Piece) -> tuple[bool, bool]:
            return isinstance(atom.content, str), atom.is_target

        for (is_text, is_target), group in groupby(self._atoms(segments), key=kind):
            if not is_text:
                yield from group
            elif text := "".join(atom.content for atom in group):
                yield Piece(text, is_target)

    def _atoms(self, segments: Sequence[Segment]) -> Iterator[Piece]:
        """Yield IMAGE, texts, and the ids of special tokens, which are recognised in structure only."""
        for segment in segments:
            if segment is IMAGE:
                yield Piece(IMAGE, False)
            elif segment.is_structure:
                for content in self._split_at_special_tokens(segment.text):
                    yield Piece(content, segment.is_target)
            else:
                yield Piece(segment.text, segment.is_target)

    def _split_at_special_tokens(self, text: str) -> list[str | int]:
        """Return `text` split into texts and special tokens; tokens that strip the spaces beside them (LLaMA's) do so."""
        parts: list[str | int] = self._special_pattern.split(text)
        # the split alternates: text, special token, text, ..
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
        """{id: AddedToken} of every special token."""
        return {
            index: token
            for index, token in self.tokenizer.added_tokens_decoder.items()
            if token.special
        }

    @cached_property
    def _special_pattern(self) -> re.Pattern:
        """A pattern that matches every special token, as a group; without any it matches nothing."""
        # longest first: a token may begin with the text of another one
        names = sorted(self.special_ids, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, names)) + ")" if names else "((?!))")
