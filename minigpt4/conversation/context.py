"""What the LLM is fed for one answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from minigpt4.models.llm.layouts import embed
from minigpt4.text.rows import IMAGE_ID


class TooLongError(ValueError):
    """A question, with its images, that the LLM has no room for."""


@dataclass(frozen=True)
class Context:
    """The prompt of an answer: token ids, IMAGE_ID where image vectors go, and the images."""

    ids: tuple[int, ...]
    images: tuple[torch.Tensor, ...]  # each [1, Q, D]
    stop: tuple[str, ...]  # strings that end the answer
    max_new_tokens: int

    def common_prefix(self, ids: Sequence[int], images: Sequence[torch.Tensor]) -> int:
        """Return how many leading positions are those of another context: equal ids, identical images."""
        pairs = enumerate(zip(self.ids, ids, strict=False))
        common = next(
            (place for place, (mine, theirs) in pairs if mine != theirs),
            min(len(self.ids), len(ids)),
        )
        # equal places may hold another image
        start = 0
        for number, image in enumerate(self.images):
            start = self.ids.index(IMAGE_ID, start)
            if start >= common:
                break
            if number >= len(images) or image is not images[number]:
                return start
            start += image.shape[1]
        return common

    def embeds(self, embedding: nn.Embedding) -> torch.Tensor:
        """Return [1, L, D]: token embeddings with the images between, in the type of `embedding`."""
        vectors = torch.cat([image[0] for image in self.images]) if self.images else None
        return embed(embedding, self.ids, vectors)[None]
