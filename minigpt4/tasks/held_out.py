"""The loss on a held-out split, and controls: the same samples with blank images and with other samples' images."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from minigpt4.common.device import to_device
from minigpt4.common.dist_utils import sum_over_ranks
from minigpt4.common.logger import batch_size

if TYPE_CHECKING:
    from minigpt4.tasks.base_task import BaseTask

CONTROLS = ("blank", "wrong")
# what is summed over the samples of each rank, then over ranks; the losses with controls are under the CONTROLS' names
SUMS = ("told_to_end", "loss", "items", "samples", *CONTROLS, "pairs", "gain", "gain_squared")
# The least gain from the right image, as a fraction of the loss, that counts as using images. A model that reads images
# gains far more (the quickstart's more than half its loss); padding and rounding change less than a thousandth.
LEAST_GAIN = 0.01
Batch = dict[str, Any]


class HeldOut(NamedTuple):
    """Means over a split, all ranks together.

    `loss` and its controls are means per target token; a sample without a control counts there with its own loss.
    `gain`: how much lower a sample's loss per token is with its own images than with another sample's, mean over
    `num_pairs` samples; `error`: its standard error. None: not known.
    """

    loss: float
    num_items: int | None = None  # target tokens, or samples if the model does not count tokens
    num_samples: int | None = None
    blank_loss: float | None = None
    wrong_loss: float | None = None
    gain: float | None = None
    error: float | None = None
    num_pairs: int = 0

    @property
    def uses_image(self) -> bool | None:
        """Whether the right images are clearly better than wrong ones: by 2 standard errors, and by LEAST_GAIN.

        None if it is not known: without controls, or with a single sample, which has no standard error.
        """
        if self.error is None:
            return None
        return self.gain > max(2 * self.error, LEAST_GAIN * self.loss)


@torch.no_grad()
def held_out_losses(
    task: "BaseTask",
    model: torch.nn.Module,
    loaders: list,
    device: torch.device,
    is_told_to_end: Callable[[], bool] = lambda: False,
) -> HeldOut | None:
    """Return the HeldOut of loaders (`BaseTask.build_eval_loaders`), None if any rank is told to end meanwhile.

    All ranks must call it. The result does not depend on the batches and the number of ranks: each sample is in the sums
    once, with the same randomly chosen prompt. Raises ValueError if no sample could be used.
    """
    model.eval()
    sums = dict.fromkeys(SUMS, 0.0)
    # Ranks may have different numbers of batches, while a sharded LLM needs all ranks in each forward pass.
    with getattr(model, "in_turns", nullcontext)():
        for batch, loader in _batches(loaders):
            if is_told_to_end():
                sums["told_to_end"] = 1.0
                break
            for name, number in _sums_of_batch(task, model, batch, loader, device).items():
                sums[name] += number
    sums = dict(zip(SUMS, sum_over_ranks(list(sums.values()), device), strict=True))
    return None if sums["told_to_end"] else _means(sums)


def _batches(loaders: list) -> Iterator[tuple[Batch, Any]]:
    """Yield (batch, its loader)."""
    for loader in loaders:
        for batch in loader:
            yield batch, loader


def _sums_of_batch(
    task: "BaseTask", model: torch.nn.Module, batch: Batch, loader: Any, device: torch.device
) -> dict[str, float]:
    """Return what a batch adds to each of SUMS."""

    def losses_and_counts(samples: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        losses, counts = task.sample_losses(model, to_device(samples, device) | {"iters": 0})
        return losses.double().cpu(), counts.cpu()

    # Without a loss per sample there is only the mean of the batch, and no controls.
    others = batch.pop("other_images", ())
    sums = {"samples": batch_size(batch)}
    if not task.has_sample_losses(model):
        loss, num_items = task.valid_step(model, to_device(batch, device) | {"iters": 0})
        return sums | dict.fromkeys(("loss", *CONTROLS), loss * num_items) | {"items": num_items}
    losses, counts = losses_and_counts(batch)
    sums |= dict.fromkeys(("loss", *CONTROLS), losses.sum().item()) | {"items": counts.sum().item()}
    # The same texts with blank and with wrong images show how much the right image helps.
    controls = _controls(batch, others, getattr(loader.source, "vis_processor", None))
    if not controls:
        return sums
    control_losses = {name: losses_and_counts(samples)[0] for name, samples in controls.items()}
    sums |= {name: control_losses[name].sum().item() for name in CONTROLS}
    # The gain per token is taken sample by sample, over the samples with another's images.
    has_control = torch.tensor([bool(len(other)) for other in others]) & (counts > 0)
    gains = ((control_losses["wrong"] - losses) / counts)[has_control]
    return sums | {
        "pairs": len(gains),
        "gain": gains.sum().item(),
        "gain_squared": gains.square().sum().item(),
    }


def _controls(batch: Batch, others: Sequence, vis_processor: Callable | None) -> dict[str, Batch]:
    """Return {name in CONTROLS: the batch with such images}, {} if there is nothing to compare with.

    `others`: for each sample the images of another one, or () if there are none; such a sample keeps its own images.
    """
    from minigpt4.datasets.datasets.image_controls import blank_pixels

    blank = blank_pixels(batch["image"], vis_processor) if any(map(len, others)) else None
    if blank is None:
        return {}
    counts = list(batch.get("num_images") or [1] * batch_size(batch))
    images = {"blank": [], "wrong": []}
    for own, grey, other in zip(
        batch["image"].split(counts), blank.split(counts), others, strict=True
    ):
        images["blank"].append(grey if len(other) else own)
        images["wrong"].append(torch.stack(list(other)) if len(other) else own)
    return {name: batch | {"image": torch.cat(parts)} for name, parts in images.items()}


def _means(sums: dict[str, float]) -> HeldOut:
    """Return the HeldOut from SUMS over all ranks."""
    if not sums["items"]:
        raise ValueError(
            "run.valid_splits, run.test_splits: no sample of the split could be used, see above"
        )
    num_items, num_pairs = int(sums["items"]), int(sums["pairs"])
    found = HeldOut(sums["loss"] / num_items, num_items, int(sums["samples"]))
    if not num_pairs:
        return found
    gain, error = sums["gain"] / num_pairs, None
    if num_pairs > 1:
        variance = max(sums["gain_squared"] - num_pairs * gain**2, 0) / (num_pairs - 1)
        error = math.sqrt(variance / num_pairs)
    controls = {f"{name}_loss": sums[name] / num_items for name in CONTROLS}
    return found._replace(**controls, gain=gain, error=error, num_pairs=num_pairs)
