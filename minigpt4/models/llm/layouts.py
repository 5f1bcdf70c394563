"""Two layouts for the rows of a batch: packed (concatenated into one sequence), or padded to the longest.

Both hold the same rows and predict the same targets. Shapes: T positions in the packed sequence, N of them predict a
target, P vision vectors, D LLM width.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from minigpt4.common.device import send
from minigpt4.text.rows import IGNORED, IMAGE_ID, Row

# `Packed.rounded` rounds T and N up to multiples of these: at MiniGPT-4's second stage that is 2 % more positions, and
# more targets cost time in the output layer only
POSITIONS, TARGETS = 64, 512
# The attention kernel is given the longest row rounded up to a multiple of this, the positions that it takes at a time.
LONGEST = 128


class DeviceInputs(NamedTuple):
    """The part of a packed batch that the device needs: as lists, or as the tensors that they become there."""

    token_ids: Any  # [T] arbitrary ids where vision vectors go
    places: Any  # [P] positions of the vision vectors
    vectors: Any  # this and the following as in Packed
    positions: Any
    predicting: Any
    targets: Any


class Packed(NamedTuple):
    """A batch as one sequence, in lists: what the LLM reads, and which position predicts what. Needs no device."""

    num_shared: int  # leading positions that all rows have in common and that appear only once
    rows: list[int]  # [rows] index in the batch of each row with a target, longest first
    lengths: list[int]  # [rows] positions of each of these rows, without the shared ones
    ids: list[int]  # [T] token ids, IMAGE_ID where a vision vector goes
    positions: list[int]  # [T] position within the row, from 0
    vectors: list[int]  # [P] index of each IMAGE_ID's vector, among all of the batch's images
    predicting: list[int]  # [N] positions whose next token is a target
    targets: list[int]  # [N] those tokens

    def rounded(self) -> "Packed":
        """Return the batch with a filler row, whose losses are not used, so that few different shapes occur.

        T becomes a multiple of POSITIONS, N of TARGETS.
        """
        # never 0, as the last position predicts the filler targets
        filler = POSITIONS - len(self.ids) % POSITIONS
        num_targets = -len(self.targets) % TARGETS
        last = len(self.ids) + filler - 1
        return self._replace(
            lengths=[*self.lengths, filler],
            ids=self.ids + [0] * filler,
            positions=self.positions + list(range(self.num_shared, self.num_shared + filler)),
            predicting=self.predicting + [last] * num_targets,
            targets=self.targets + [0] * num_targets,
        )

    def device_inputs(self) -> DeviceInputs:
        """Return the lists that the device needs."""
        token_ids, places = split_ids(self.ids)
        own = self.vectors, self.positions, self.predicting, self.targets
        return DeviceInputs(token_ids, places, *own)


class Padded(NamedTuple):
    """A batch as lists of equal length, padded on the right; `vectors` as in Packed, of all rows."""

    ids: list[list[int]]  # [B][L]
    mask: list[list[int]]  # [B][L] 1 for a position of the row, 0 for padding
    labels: list[list[int]]  # [B][L]
    vectors: list[int]


def pack(rows: Sequence[Row], num_image_tokens: int, may_share: bool = True) -> Packed:
    """Return the rows with a target as one sequence, the longest first so that similar lengths are neighbours.

    A row is cut before its last target, as later positions predict nothing. The text that all rows begin with appears
    once, unless `may_share` is False: it predicts nothing, so with a frozen LLM it needs no gradient.
    """
    targets = [_target_places(row) for row in rows]
    order = [number for number, places in enumerate(targets) if places]
    order.sort(key=lambda number: targets[number][-1], reverse=True)
    # the common beginning ends before the first position that predicts a target, or has an image
    shared = []
    if may_share:
        beginnings = [rows[number].ids[: targets[number][0] - 1] for number in order]
        columns = itertools.takewhile(_is_same_text, zip(*beginnings, strict=False))
        shared = [column[0] for column in columns]
    packed = Packed(len(shared), order, [], list(shared), list(range(len(shared))), [], [], [])
    for number in order:
        row, places = rows[number], targets[number]
        # the row's position p is at start + p in the sequence, for those that are not shared
        start = len(packed.ids) - len(shared)
        ids = row.ids[: places[-1]]
        packed.lengths.append(len(ids) - len(shared))
        packed.ids.extend(ids[len(shared) :])
        packed.positions.extend(range(len(shared), len(ids)))
        packed.vectors.extend(_vectors(row, ids, num_image_tokens))
        packed.predicting.extend(start + place - 1 for place in places)
        packed.targets.extend(row.labels[place] for place in places)
    return packed


def _vectors(row: Row, ids: Sequence[int], num_image_tokens: int) -> range:
    """Return the indices of the vectors in `ids`, the beginning of a row; its last image may be cut off."""
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
        padding = longest - len(row.ids)
        padded.ids.append(row.ids + [pad_id] * padding)
        padded.mask.append([1] * len(row.ids) + [0] * padding)
        padded.labels.append(row.labels + [IGNORED] * padding)
        padded.vectors.extend(_vectors(row, row.ids, num_image_tokens))
    return padded


def embed(
    embedding: nn.Embedding, ids: Sequence[int], vectors: torch.Tensor | None
) -> torch.Tensor:
    """Return [T, D]: the embeddings of token ids [T], with `vectors` [P, D] at the places of IMAGE_ID.

    Never waits for the device.
    """
    token_ids, places = send(*split_ids(ids), device=embedding.weight.device)
    return insert_vectors(embedding(token_ids), places, vectors)


def split_ids(ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return (token ids [T] that can be embedded, 0 in place of IMAGE_ID, and the places [P] of IMAGE_ID)."""
    token_ids = [max(index, 0) for index in ids]
    return token_ids, [place for place, index in enumerate(ids) if index == IMAGE_ID]


def insert_vectors(
    embeds: torch.Tensor, places: torch.Tensor, vectors: torch.Tensor | None
) -> torch.Tensor:
    """Return embeddings [T, D] with `vectors` [P, D] at `places` [P]."""
    return embeds if vectors is None else embeds.index_copy(0, places, vectors.to(embeds))


def select_vectors(images: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
    """Return the vectors [P, D] with these indices among all vectors of images [B, Q, D]."""
    vectors = images.flatten(0, 1)
    if list(indices) != list(range(len(vectors))):
        vectors = vectors.index_select(0, *send(indices, device=images.device))
    return vectors
