"""The input of the LLM for one answer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from minigpt4.models.llm.layouts import embed
from minigpt4.text.rows import IMAGE_ID


class TooLongError(ValueError):
    """A question, with its images, does not fit into the LLM's context."""


@dataclass(frozen=True)
class Context:
    """The prompt of an answer: token ids, with IMAGE_ID at each position of an image, and the images' embeddings."""

    ids: tuple[int, ...]
    images: tuple[torch.Tensor, ...]  # each [1, Q, D]
    stop: tuple[str, ...]  # strings that end the answer
    max_new_tokens: int

    def common_prefix(self, ids: Sequence[int], images: Sequence[torch.Tensor]) -> int:
        """Return how many leading positions equal another context's: the same ids, and the same tensors as images."""
        common = 0
        for mine, theirs in zip(self.ids, ids, strict=False):
            if mine != theirs:
                break
            common += 1
        # the prefix ends before the first image that differs, which the ids do not show
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
        """Return the embeddings [1, L, D] of tokens and images, in the dtype of `embedding`."""
        vectors = torch.cat([image[0] for image in self.images]) if self.images else None
        return embed(embedding, self.ids, vectors)[None]
