"""A prompt as segments: text that the template wrote, text that somebody typed, and slots for images.

Nothing is ever found again by searching in a finished string, so typed text can neither open an image slot nor end a
turn: `<ImageHere>` and the names of special tokens in a message are tokenised as plain letters.
"""

import re
import threading
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch


@dataclass(frozen=True)
class ImageSlot:
    """The place of one image; the k-th slot of a prompt belongs to the k-th image of the conversation."""

    def __str__(self):
        return "<ImageHere>"


IMAGE = ImageSlot()


@dataclass(frozen=True)
class Text:
    """A stretch of prompt text; special tokens are recognised in structure only, never in messages."""

    text: str
    is_structure: bool = False

    def __str__(self):
        return self.text


@dataclass(frozen=True)
class Context:
    """What the LLM is fed for one answer, and what identifies every position of it.

    `positions` has one entry a position: a token id, or (image number, row) inside an image.
    """

    positions: tuple
    images: tuple  # of [1, Q, D]
    stop: tuple  # strings that end the answer
    max_new_tokens: int

    def common_prefix(self, positions, images):
        """Return how many leading positions mean the same as in another context: equal ids, identical images."""
        for index, (mine, theirs) in enumerate(zip(self.positions, positions, strict=False)):
            if mine != theirs or (isinstance(mine, tuple) and self.images[mine[0]] is not images[mine[0]]):
                return index
        return min(len(self.positions), len(positions))

    def embeds(self, embedding):
        """Return [1, L, D]: token embeddings with the images between, in the type of `embedding`'s weight."""
        weight = embedding.weight
        ids = [0 if isinstance(position, tuple) else position for position in self.positions]
        embeds = embedding(torch.tensor([ids], device=weight.device))
        for number, image in enumerate(self.images):
            start = self.positions.index((number, 0))
            embeds[:, start : start + image.shape[1]] = image.to(embeds)
        return embeds


class PromptEncoder:
    """Segments -> token ids with the tokenizer of the LLM."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._lock = threading.Lock()  # `split_special_tokens` is a switch on the tokenizer that all threads share

    @cached_property
    def special_ids(self):
        """Token text -> id of every special token."""
        return {token.content: index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}

    def encode(self, segments):
        """Return a list of token id lists and IMAGE, the first list with BOS (if the tokenizer has one).

        Text between two images or special tokens is tokenised in one go, as in training: words may merge across
        segments.
        """
        bos = self.tokenizer.bos_token_id
        pieces = [[] if bos is None else [bos]]
        for is_text, group in groupby(self._atoms(segments), key=lambda atom: isinstance(atom, str)):
            if is_text:
                pieces[-1] += self._encode_text("".join(group))
                continue
            for atom in group:
                if atom is IMAGE:
                    pieces += [IMAGE, []]
                else:
                    pieces[-1].append(atom)
        return pieces

    def _atoms(self, segments):
        """Yield plain strings, ids of the special tokens that structure names, and IMAGE."""
        for segment in segments:
            if segment is IMAGE:
                yield IMAGE
            elif segment.is_structure:  # a split by a group gives text, special token, text, ..: the odd are special
                for index, part in enumerate(self._special_pattern.split(segment.text)):
                    yield self.special_ids[part] if index % 2 else part
            else:
                yield segment.text

    @cached_property
    def _special_pattern(self):
        # longest first, so that a token that begins like another one is found; no special tokens: match nothing
        names = sorted(self.special_ids, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, names)) + ")" if names else "((?!))")

    def _encode_text(self, text):
        if not text:
            return []
        with self._lock:
            return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def positions_of(pieces, images):
    """Return the tuple of a context's positions from encoded pieces and the embeddings of the images."""
    positions, number = [], 0
    for piece in pieces:
        if piece is IMAGE:
            positions += [(number, row) for row in range(images[number].shape[1])]
            number += 1
        else:
            positions += piece
    return tuple(positions)
