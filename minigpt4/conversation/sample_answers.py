"""Answers to the prompts of training samples, rather than to a dialogue."""

import math
from itertools import groupby
from typing import Any

import torch
from torch import nn

from minigpt4.conversation.chat import Chat
from minigpt4.conversation.context import Context
from minigpt4.text.release_samples import from_release
from minigpt4.text.rows import IMAGE_ID


def can_answer(model: nn.Module) -> bool:
    """Return whether a model has what `answer_samples` needs."""
    needed = ("rows", "encode_batch", "num_image_tokens", "decoder", "llama_tokenizer", "end_sym")
    return all(hasattr(model, name) for name in needed)


@torch.no_grad()
def answer_samples(
    model: nn.Module, samples: dict[str, Any], max_new_tokens: int
) -> list[tuple[str, str]]:
    """Return (prompt, greedy answer) of each sample of a batch on the model's device, computed as one batch.

    The prompt is everything before the first answer in the sample's row, token by token; in its text `[image]` stands
    for the embeddings of an image. An answer ends before `end_sym`, or after `max_new_tokens` tokens.
    """
    samples = from_release(samples)
    vectors = model.encode_batch(samples["image"]).split(1)
    stop = (model.end_sym if model.end_sym.strip() else "\n",)
    contexts = []
    for row in model.rows(samples):
        ids = tuple(row.ids[: row.num_prompt])
        # the prompt may be cut within its last image
        images, num_left = [], ids.count(IMAGE_ID)
        while num_left > 0:
            images.append(vectors[row.images[len(images)]][:, :num_left])
            num_left -= images[-1].shape[1]
        contexts.append(Context(ids, tuple(images), stop, max_new_tokens))
    prompts = [
        _readable(context.ids, model.llama_tokenizer, model.num_image_tokens)
        for context in contexts
    ]
    answers = Chat(model, None).answer_contexts(
        contexts, temperature=0, max_new_tokens=max_new_tokens
    )
    return list(zip(prompts, answers, strict=True))


def _readable(ids: tuple[int, ...], tokenizer: Any, num_image_tokens: int) -> str:
    parts = []
    for is_image, group in groupby(ids, lambda index: index == IMAGE_ID):
        run = list(group)
        if is_image:
            parts.append("[image]" * math.ceil(len(run) / num_image_tokens))
        else:
            parts.append(tokenizer.decode(run))
    return "".join(parts)
