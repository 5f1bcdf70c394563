"""Controls of a validation split: blank images, and for each sample the images of another one."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

GREY = (128, 128, 128)
TRIED = 50  # samples before one, of which the first with another image is taken


def blank_image(size: tuple[int, int]) -> Image.Image:
    """Return a grey image of a size."""
    return Image.new("RGB", size, GREY)


def blank_pixels(pixels: torch.Tensor, vis_processor: Callable | None) -> torch.Tensor | None:
    """Return grey images of the shape and type of `pixels`, [I, S, S, 3] of bytes or processed [I, 3, S, S].

    None where nobody can say what a processor makes of grey.
    """
    if pixels.dtype == torch.uint8:  # as the image lies in memory
        return torch.full_like(pixels, GREY[0])
    if vis_processor is None or not len(pixels):
        return None
    blank = vis_processor(blank_image((pixels.shape[-1], pixels.shape[-2])))
    return blank.to(pixels).expand_as(pixels) if blank.shape == pixels.shape[1:] else None


def images_of(sample: dict) -> list[torch.Tensor]:
    """Return the images of a sample, in order."""
    return list(sample["images"]) if "images" in sample else [sample["image"]]


def are_other(images: list[torch.Tensor], own: list[torch.Tensor]) -> bool:
    """Return whether images can stand in the place of a sample's own, and are not the same."""
    shapes = [image.shape for image in own]
    if not own or [image.shape for image in images] != shapes:
        return False
    return not all(torch.equal(image, mine) for image, mine in zip(images, own, strict=True))


def with_other_images(dataset: Any) -> Dataset:
    """Return a split whose samples have "other_images", too: as many as they have images, of another sample.

    That is the nearest one before it in the split (before the first comes the last) whose images differ: several
    questions about an image may follow each other. It depends neither on batches nor on ranks. In a stream, which has
    no indices, it is the nearest one before it of those that the same worker reads.
    """
    is_stream = isinstance(dataset, IterableDataset)
    return _StreamWithOtherImages(dataset) if is_stream else _WithOtherImages(dataset)


class _WithOtherImages(Dataset):
    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict | None:
        sample = self.dataset[index]
        if sample is None or not (own := images_of(sample)):
            return sample
        for distance in range(1, min(TRIED + 1, len(self))):
            other = self.dataset[(index - distance) % len(self)]
            if other is not None and are_other(images_of(other), own):
                return sample | {"other_images": images_of(other)}
        return sample


class _StreamWithOtherImages(IterableDataset):
    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __iter__(self) -> Iterator[dict]:
        last, before = [], []  # two that differ: of the sample read last, and of the one before it
        for sample in self.dataset:
            own = images_of(sample)
            if not last or are_other(last, own):
                last, before = own, last
            yield sample | {"other_images": before} if are_other(before, own) else sample
