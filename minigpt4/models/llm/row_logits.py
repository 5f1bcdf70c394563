"""From rows and image vectors to the losses of the target tokens, by either layout (packed or padded).

Shapes: B rows, L positions in the longest row, N targets, Q vectors per image, D LLM width, V vocabulary.
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
from minigpt4.models.llm.layouts import DeviceInputs, Packed, insert_vectors, select_vectors
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
    """Return the losses [N] of packed rows; `images` [.., Q, D] are the vectors of the batch's images.

    `label_logits`: one of backends.PACKED. `recompute`: activation checkpointing of the LLM's layers. `recorder`:
    records the pass as a CUDA graph; the batch is then padded to a rounded number of positions and targets.
    """
    embedding, num_targets = llm.get_input_embeddings(), len(batch.targets)
    batch = batch.rounded() if recorder else batch
    rounding = layouts.LONGEST if recorder else 1
    device, lists = embedding.weight.device, batch.device_inputs()
    segments = Segments(batch.lengths, device, batch.num_shared, lists, rounding)

    def losses(vectors: torch.Tensor, integers: torch.Tensor) -> torch.Tensor:
        # at every call: a graph has to compute the limits of attention from `integers`, into which replays copy each batch's
        if recorder is not None:
            segments.set_integers(integers)
        inputs = DeviceInputs(*segments.sent)
        selected = vectors.flatten(0, 1).index_select(0, inputs.vectors)
        embeds = insert_vectors(embedding(inputs.token_ids), inputs.places, selected)
        logits = label_logits(llm, embeds, inputs.positions, segments, inputs.predicting, recompute)
        return TokenLosses.apply(logits, inputs.targets)

    if recorder is None:
        return losses(images, segments.integers)
    # the key holds all that the pass depends on apart from its tensors, such as how `integers` is split into lists
    limits = segments.num_shared, segments.most_queries, segments.most_keys
    key = ("LLM", label_logits, *segments.sizes, *limits)
    return recorder(key, losses, images, segments.integers)[:num_targets]


def padded(
    llm: nn.Module, rows: Sequence[Row], images: torch.Tensor, pad_id: int, recompute: bool = False
) -> torch.Tensor:
    """Return the losses [N] of rows padded to the longest, as in 2023."""
    targets, places = [], []
    for number, row in enumerate(rows):
        for place, label in enumerate(row.labels):
            if label != IGNORED:
                places.append((number, place))
                targets.append(label)
    # the output layer is large: it computes only columns that predict a target in some row, [B, columns, V]
    columns = sorted({place - 1 for _, place in places})
    column_of = {place: column for column, place in enumerate(columns)}
    indices = [number * len(columns) + column_of[place - 1] for number, place in places]
    inputs = padded_inputs(llm, rows, images, pad_id)
    inputs.pop("labels")
    device = inputs["inputs_embeds"].device
    columns, indices = send(columns, indices, device=device)
    with recompute_layers(llm) if recompute else nullcontext():
        logits = llm(**inputs, use_cache=False, logits_to_keep=columns).logits
    # of these columns, each row's own targets, [N, V]
    logits = logits.flatten(0, 1).index_select(0, indices)
    return TokenLosses.apply(logits, *send(targets, device=device))


def padded_inputs(
    llm: nn.Module, rows: Sequence[Row], images: torch.Tensor, pad_id: int
) -> dict[str, torch.Tensor]:
    """Return {"inputs_embeds" [B, L, D], "attention_mask" [B, L], "labels" [B, L]} of rows padded to the longest."""
    batch = layouts.pad(rows, images.shape[1], pad_id)
    ids = []
    for row_ids in batch.ids:
        ids += row_ids
    vectors = select_vectors(images, batch.vectors)
    embeds = layouts.embed(llm.get_input_embeddings(), ids, vectors)
    return {
        "inputs_embeds": embeds.unflatten(0, (len(rows), -1)),
        "attention_mask": torch.tensor(batch.mask).to(embeds.device),
        "labels": torch.tensor(batch.labels).to(embeds.device),
    }


def sums_of_rows(losses: torch.Tensor, order: Sequence[int], rows: Sequence[Row]) -> torch.Tensor:
    """Return the sum of each row's losses [B], 0 for a row without a target.

    `losses` [N] are those of the targets, row after row; `order` lists the indices of these rows.
    """
    # one sum per row: a scattered sum on a GPU is not deterministic
    counts = [rows[number].num_targets for number in order]
    sums = torch.stack([part.sum() for part in losses.split(counts)])
    (indices,) = send(order, device=losses.device)
    return losses.new_zeros(len(rows)).index_copy(0, indices, sums)


class TokenLosses(torch.autograd.Function):
    """Cross entropy [N] of logits [N, V] with targets [N], computed in float32 for a few rows at a time.

    For backward it saves the logits in their own type, never a float32 copy of all of them.
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
        pieces = zip(*(each.split(size) for each in (out, logits, targets, grad)), strict=True)
        for piece, rows, target, scale in pieces:
            # gradient of cross entropy: the probabilities, less 1 at the target
            probs = rows.float().softmax(-1)
            probs.scatter_add_(1, target[:, None], probs.new_full((len(target), 1), -1.0))
            piece.copy_(probs.mul_(scale[:, None]))
        return out, None


def _rows_at_a_time(logits: torch.Tensor) -> int:
    """Return how many rows of logits fit into a CPU's cache, or make a short-lived copy on a GPU."""
    num_elements = 2**19 if logits.device.type == "cpu" else 2**26
    return max(1, num_elements // logits.shape[1])
