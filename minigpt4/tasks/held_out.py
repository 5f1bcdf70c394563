"""The loss of a held-out split, and of the same samples with blank and with other samples' images."""

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
# over the samples of this rank: losses, items they are of, samples; losses with controls; pairs and their gains
SUMS = ("told_to_end", "loss", "items", "samples", *CONTROLS, "pairs", "gain", "gain_squared")
# What an image must bring, as a share of the loss: a model that reads images gains far more (the quickstart's loses
# half its loss and more), while what padding and rounding bring is below a thousandth.
LEAST_GAIN = 0.01
Batch = dict[str, Any]


class HeldOut(NamedTuple):
    """Means over a split, all ranks together.

    `loss` and its controls: a target token's, over all tokens; a sample without a control counts there with its own
    loss. `gain`: how much lower a sample's loss a token is with its own images than with another sample's, mean over
    the `num_pairs` samples; `error`: its standard error. None: not known.
    """

    loss: float
    num_items: int | None = None  # target tokens, or samples where the model counts no tokens
    num_samples: int | None = None
    blank_loss: float | None = None
    wrong_loss: float | None = None
    gain: float | None = None
    error: float | None = None
    num_pairs: int = 0

    @property
    def uses_image(self) -> bool | None:
        """Whether the right images are clearly better than wrong ones: by 2 standard errors, and by LEAST_GAIN.

        None where it cannot be told: no control, or one sample alone, which has no standard error.
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
    """Return the HeldOut of loaders (`BaseTask.build_eval_loaders`), None if one of the ranks is told to end meanwhile.

    All ranks call it. Each sample is once in the sums, whatever the batches and the number of ranks; a drawn prompt is
    the same one for all. Raises ValueError where no sample could be used.
    """
    model.eval()
    sums = dict.fromkeys(SUMS, 0.0)
    with getattr(model, "in_turns", nullcontext)():  # ranks may have shares of other sizes
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
    """Return what a batch adds to SUMS."""

    def of_samples(samples: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        losses, counts = task.sample_losses(model, to_device(samples, device) | {"iters": 0})
        return losses.double().cpu(), counts.cpu()

    # A model that cannot give a loss a sample has its batch mean only, and no controls.
    others = batch.pop("other_images", ())
    sums = {"samples": batch_size(batch)}
    if not task.has_sample_losses(model):
        loss, num_items = task.valid_step(model, to_device(batch, device) | {"iters": 0})
        return sums | dict.fromkeys(("loss", *CONTROLS), loss * num_items) | {"items": num_items}
    losses, counts = of_samples(batch)
    sums |= dict.fromkeys(("loss", *CONTROLS), losses.sum().item()) | {"items": counts.sum().item()}
    # The same texts with blank and with wrong images: what the own image is worth.
    controls = _controls(batch, others, getattr(loader.source, "vis_processor", None))
    if not controls:
        return sums
    of_control = {name: of_samples(samples)[0] for name, samples in controls.items()}
    sums |= {name: of_control[name].sum().item() for name in CONTROLS}
    # The gain a token is compared sample by sample, over those that have another's image.
    has_control = torch.tensor([bool(len(other)) for other in others]) & (counts > 0)
    gains = ((of_control["wrong"] - losses) / counts)[has_control]
    return sums | {
        "pairs": len(gains),
        "gain": gains.sum().item(),
        "gain_squared": gains.square().sum().item(),
    }


def _controls(batch: Batch, others: Sequence, vis_processor: Callable | None) -> dict[str, Batch]:
    """Return {one of CONTROLS: the batch with such images}, {} where there is nothing to compare with.

    `others`: of each sample the images of another one, () for none; such a sample keeps its own.
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
    """Return the HeldOut of SUMS over all ranks."""
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
