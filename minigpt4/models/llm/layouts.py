"""Rows of a batch as tensors: packed one behind the other, or padded to the longest.

Both layouts hold the same rows and predict the same targets. Shapes: T positions fed, N of them
predict a target, P vision vectors, D LLM width.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from minigpt4.common.device import send
from minigpt4.text.rows import IGNORED, IMAGE_ID, Row

# what `Packed.rounded` rounds to: 2 % more positions at MiniGPT-4's second stage, targets cost the output layer alone
POSITIONS, TARGETS = 64, 512
LONGEST = (
    128  # and the longest row, of which the attention kernel takes as many positions at a time
)


class Sent(NamedTuple):
    """What of a packed batch goes to the device: lists, or the tensors that they become there."""

    words: Any  # [T] token ids, any where a vision vector goes
    places: Any  # [P] where those vectors go
    vectors: Any
    positions: Any
    predicting: Any
    targets: Any


class Packed(NamedTuple):
    """A batch as lists: what to feed and what is predicted where. Needs no device."""

    num_shared: int  # leading positions that begin every row, fed once
    rows: list[int]  # index in the batch of each row with a target, longest first
    lengths: list[int]  # of these rows, without what they share
    ids: list[int]  # [T] token ids, IMAGE_ID where a vision vector goes
    positions: list[int]  # [T] from 0 in each row
    # [P] index among those of the batch's images, of each that is fed, in the order of its place
    vectors: list[int]
    predicting: list[int]  # [N] positions whose next token is a target
    targets: list[int]  # [N]

    def rounded(self) -> "Packed":
        """Return it with a last row whose targets nobody reads, so that batches have few different shapes.

        T becomes a multiple of POSITIONS, N of TARGETS.
        """
        more = POSITIONS - len(self.ids) % POSITIONS  # one position at least, for the targets
        num_targets = -len(self.targets) % TARGETS
        last = len(self.ids) + more - 1
        return self._replace(
            lengths=[*self.lengths, more],
            ids=self.ids + [0] * more,
            positions=self.positions + list(range(self.num_shared, self.num_shared + more)),
            predicting=self.predicting + [last] * num_targets,
            targets=self.targets + [0] * num_targets,
        )

    def sent(self) -> Sent:
        """Return the lists that the device needs."""
        return Sent(
            *embedded(self.ids), self.vectors, self.positions, self.predicting, self.targets
        )


class Padded(NamedTuple):
    """A batch as lists of equal length, padded on the right; `vectors` as in Packed, of all rows."""

    ids: list[list[int]]  # [B][L]
    mask: list[list[int]]  # [B][L] 1 where a row has a position
    labels: list[list[int]]  # [B][L]
    vectors: list[int]


def pack(rows: Sequence[Row], num_image_tokens: int, may_share: bool = True) -> Packed:
    """Return the rows one behind the other.

    A row ends before its last target: what comes later predicts nothing. What all rows begin with
    is fed once, unless `may_share` is False: it is text that predicts nothing, so for a frozen LLM
    it is a constant. The longest row comes first: those of like length lie together.
    """
    targets = [_target_places(row) for row in rows]
    fed = [number for number, places in enumerate(targets) if places]
    fed.sort(key=lambda number: targets[number][-1], reverse=True)
    shared = []
    if may_share:
        beginnings = [rows[number].ids[: targets[number][0] - 1] for number in fed]
        shared = list(itertools.takewhile(_is_same_text, zip(*beginnings, strict=False)))
        shared = [column[0] for column in shared]
    packed = Packed(len(shared), fed, [], list(shared), list(range(len(shared))), [], [], [])
    for number in fed:
        row, places = rows[number], targets[number]
        start = len(packed.ids) - len(shared)  # of the row, had it all its positions
        ids = row.ids[: places[-1]]
        packed.lengths.append(len(ids) - len(shared))
        packed.ids.extend(ids[len(shared) :])
        packed.positions.extend(range(len(shared), len(ids)))
        packed.vectors.extend(_vectors(row, ids, num_image_tokens))
        packed.predicting.extend(start + place - 1 for place in places)
        packed.targets.extend(row.labels[place] for place in places)
    return packed


def _vectors(row: Row, ids: Sequence[int], num_image_tokens: int) -> range:
    """Return the vectors that the first positions `ids` of a row take; the last image may be cut."""
    start = row.images.start * num_image_tokens
    return range(start, start + ids.count(IMAGE_ID))


def _target_places(row: Row) -> list[int]:
    return [place for place, label in enumerate(row.labels) if label != IGNORED]


def _is_same_text(column: tuple[int, ...]) -> bool:
    return len(set(column)) == 1 and column[0] != IMAGE_ID


def pad(rows: Sequence[Row], num_image_tokens: int, pad_id: int) -> Padded:
    """Return the rows padded to the longest."""
    longest = max(len(row.ids) for row in rows)
    padded = Padded([], [], [], [])
    for row in rows:
        room = longest - len(row.ids)
        padded.ids.append(row.ids + [pad_id] * room)
        padded.mask.append([1] * len(row.ids) + [0] * room)
        padded.labels.append(row.labels + [IGNORED] * room)
        padded.vectors.extend(_vectors(row, row.ids, num_image_tokens))
    return padded


def embed(
    embedding: nn.Embedding, ids: Sequence[int], vectors: torch.Tensor | None
) -> torch.Tensor:
    """Return [T, D]: embeddings of token ids [T], `vectors` [P, D] in the places of IMAGE_ID.

    Waits for no device.
    """
    words, places = send(*embedded(ids), device=embedding.weight.device)
    return put(embedding(words), places, vectors)


def embedded(ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return (token ids [T], any where a vision vector goes, the places [P] of those vectors)."""
    return [max(index, 0) for index in ids], [
        place for place, index in enumerate(ids) if index == IMAGE_ID
    ]


def put(words: torch.Tensor, places: torch.Tensor, vectors: torch.Tensor | None) -> torch.Tensor:
    """Return embeddings [T, D] with `vectors` [P, D] at `places` [P]."""
    return words if vectors is None else words.index_copy(0, places, vectors.to(words))


def select_vectors(images: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Return the vectors [P, D] of images [B, Q, D] in another order, some left out."""
    vectors = images.flatten(0, 1)
    if list(order) != list(range(len(vectors))):
        vectors = vectors.index_select(0, *send(order, device=images.device))
    return vectors
