"""From rows and images to the losses of the targets, by either layout.

Shapes: B rows, L positions of the longest, N targets, Q vectors an image, D LLM width, V
vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from minigpt4.common.cuda_graphs import Recorder
from minigpt4.common.device import send
from minigpt4.models.llm import layouts
from minigpt4.models.llm.attention import Segments
from minigpt4.models.llm.layouts import Packed, Sent, embed, pad, put, select_vectors
from minigpt4.models.llm.recompute import recompute_layers
from minigpt4.text.rows import IGNORED, Row


def packed(
    llm: nn.Module,
    batch: Packed,
    images: torch.Tensor,
    label_logits: Callable,
    recompute: bool = False,
    recorder: Recorder | None = None,
) -> torch.Tensor:
    """Return the losses [N] of packed rows; `images` [.., Q, D] are those of the batch.

    `label_logits`: one of backends.PACKED. `recompute`: activation checkpointing of the LLM's
    layers. `recorder`: records the pass; positions and targets are then rounded up.
    """
    embedding, num_targets = llm.get_input_embeddings(), len(batch.targets)
    batch = batch.rounded() if recorder else batch
    rounding = layouts.LONGEST if recorder else 1
    device, lists = embedding.weight.device, batch.sent()
    segments = Segments(batch.lengths, device, batch.num_shared, lists, rounding)

    def losses(vectors: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        # at every call: a graph has to compute the limits of attention from `flat`, where replays put other integers
        if recorder is not None:
            segments.take(flat)
        sent = Sent(*segments.sent)
        chosen = vectors.flatten(0, 1).index_select(0, sent.vectors)
        embeds = put(embedding(sent.words), sent.places, chosen)
        logits = label_logits(llm, embeds, sent.positions, segments, sent.predicting, recompute)
        return TokenLosses.apply(logits, sent.targets)

    if recorder is None:
        return losses(images, segments.flat)
    # all that the pass depends on beside its tensors; their shapes do not tell how the integers are divided
    limits = segments.num_shared, segments.most_queries, segments.most_keys
    name = ("LLM", label_logits, *segments.sizes, *limits)
    return recorder(name, losses, images, segments.flat)[:num_targets]


def padded(
    llm: nn.Module, rows: Sequence[Row], images: torch.Tensor, pad_id: int, recompute: bool = False
) -> torch.Tensor:
    """Return the losses [N] of rows padded to the longest, as 2023."""
    targets, places = [], []
    for number, row in enumerate(rows):
        for place, label in enumerate(row.labels):
            if label != IGNORED:
                places.append((number, place))
                targets.append(label)
    # only columns that predict a target in some row go through the output layer
    columns = sorted({place - 1 for _, place in places})
    column_of = {place: column for column, place in enumerate(columns)}
    inputs = padded_inputs(llm, rows, images, pad_id)
    inputs.pop("labels")
    chosen = [number * len(columns) + column_of[place - 1] for number, place in places]
    device = inputs["inputs_embeds"].device
    columns, chosen = send(columns, chosen, device=device)
    with recompute_layers(llm) if recompute else nullcontext():
        logits = llm(**inputs, use_cache=False, logits_to_keep=columns).logits  # [B, columns, V]
    logits = logits.flatten(0, 1).index_select(0, chosen)
    return TokenLosses.apply(logits, *send(targets, device=device))


def padded_inputs(
    llm: nn.Module, rows: Sequence[Row], images: torch.Tensor, pad_id: int
) -> dict[str, torch.Tensor]:
    """Return {"inputs_embeds" [B, L, D], "attention_mask" [B, L], "labels" [B, L]}."""
    batch = pad(rows, images.shape[1], pad_id)
    ids = []
    for row_ids in batch.ids:
        ids += row_ids
    embeds = embed(llm.get_input_embeddings(), ids, select_vectors(images, batch.vectors))
    return {
        "inputs_embeds": embeds.unflatten(0, (len(rows), -1)),
        "attention_mask": torch.tensor(batch.mask).to(embeds.device),
        "labels": torch.tensor(batch.labels).to(embeds.device),
    }


def sums_of_rows(losses: torch.Tensor, order: Sequence[int], rows: Sequence[Row]) -> torch.Tensor:
    """Return the sum of each row's losses [B], 0 for a row without a target.

    `losses` [N] are those of the rows' targets, one row behind the other as `order` has them.
    """
    # by pieces: on a GPU a scattered sum is not the same each time
    counts = [rows[number].num_targets for number in order]
    sums = [part.sum() for part in losses.split(counts)]
    return losses.new_zeros(len(rows)).index_copy(
        0, *send(order, device=losses.device), torch.stack(sums)
    )


class TokenLosses(torch.autograd.Function):
    """Cross entropy [N] of logits [N, V] with targets [N] in float32, a few rows at a time.

    For backward it keeps the logits in their own type and nothing in float32.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits, targets)
        size, losses = _rows_at_a_time(logits), []
        for rows, target in zip(logits.split(size), targets.split(size), strict=True):
            losses.append(nn.functional.cross_entropy(rows.float(), target, reduction="none"))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets = ctx.saved_tensors
        size, out = _rows_at_a_time(logits), torch.empty_like(logits)
        parts = zip(*(each.split(size) for each in (out, logits, targets, grad)), strict=True)
        for part, rows, target, scale in parts:
            # the gradient: what softmax gives each token, less one for the target
            shares = rows.float().softmax(-1)
            shares.scatter_add_(1, target[:, None], shares.new_full((len(target), 1), -1.0))
            part.copy_(shares.mul_(scale[:, None]))
        return out, None


def _rows_at_a_time(logits: torch.Tensor) -> int:
    """Return how many rows make a piece that stays in a CPU's cache, or is soon done on a GPU."""
    return max(1, (2**19 if logits.device.type == "cpu" else 2**26) // logits.shape[1])
