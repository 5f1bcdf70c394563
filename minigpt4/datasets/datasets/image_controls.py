"""Control images for validation: blank images, and for each sample the images of another sample."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

GREY = (128, 128, 128)
TRIED = 50  # preceding samples among which one with other images is searched


def blank_image(size: tuple[int, int]) -> Image.Image:
    """Return a grey image of the given (width, height)."""
    return Image.new("RGB", size, GREY)


def blank_pixels(pixels: torch.Tensor, vis_processor: Callable | None) -> torch.Tensor | None:
    """Return grey images like `pixels`: uint8 [I, S, S, 3], or processed [I, 3, S, S].

    None if the pixels are processed by an unknown processor, or by one that gives other shapes.
    """
    if pixels.dtype == torch.uint8:  # not processed yet
        return torch.full_like(pixels, GREY[0])
    if vis_processor is None or not len(pixels):
        return None
    blank = vis_processor(blank_image((pixels.shape[-1], pixels.shape[-2])))
    return blank.to(pixels).expand_as(pixels) if blank.shape == pixels.shape[1:] else None


def images_of(sample: dict) -> list[torch.Tensor]:
    """Return the images of a sample, in order."""
    return list(sample["images"]) if "images" in sample else [sample["image"]]


def are_other(images: list[torch.Tensor], own: list[torch.Tensor]) -> bool:
    """Return whether `images` have the shapes of a sample's `own` images, but other content."""
    shapes = [image.shape for image in own]
    if not own or [image.shape for image in images] != shapes:
        return False
    return not all(torch.equal(image, mine) for image, mine in zip(images, own, strict=True))


def with_other_images(dataset: Any) -> Dataset:
    """Return a split whose samples also have "other_images": the images of another sample, of the same shapes.

    That sample is the nearest preceding one in the split (the last one precedes the first) whose images differ, since
    several questions about one image may follow each other. The choice depends neither on batches nor on ranks. In a
    stream, which has no indices, it is the nearest preceding sample that the same worker has read. A sample for which
    none is found has no "other_images".
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
        latest, previous = [], []  # the last two different sets of images that were read
        for sample in self.dataset:
            own = images_of(sample)
            if not latest or are_other(latest, own):
                latest, previous = own, latest
            yield sample | {"other_images": previous} if are_other(previous, own) else sample
