"""Sends images from worker to device as uint8, a quarter of the memory of float32, with bit-identical results.

`halves` splits a processor: the dataset applies the first part in the worker
(`BaseDataset.processed`), `collate` puts the second part into the batch under "normalise", and
`to_device` applies it on the device.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from minigpt4.processors.blip_processors import BlipImageProcessor
from minigpt4.processors.images import to_rgb


def halves(process: Callable) -> tuple[Callable, Callable | None]:
    """Return (first, last) with `last(first(image))` equal to `process(image)`.

    `first` returns uint8 [S, S, 3], and `last` converts uint8 [..., S, S, 3] to float32 [..., 3, S, S].
    A processor with another chain of transforms or its own `__call__` is not split: (process, None).
    """
    is_ours = isinstance(process, BlipImageProcessor)
    if is_ours and type(process).__call__ is BlipImageProcessor.__call__:
        match process.transform.transforms:
            case [*geometry, transforms.ToTensor(), transforms.Normalize(mean=mean, std=std)]:
                first = transforms.Compose([to_rgb, *geometry, to_pixels])
                return first, Normalise(tuple(map(float, mean)), tuple(map(float, std)))
    return process, None


def to_pixels(image: Image.Image) -> torch.Tensor:
    """Return a PIL RGB image as uint8 [H, W, 3], its layout in memory."""
    return torch.from_numpy(np.array(image))


@dataclass(frozen=True)
class Normalise:
    """Converts uint8 [..., H, W, 3] to float32 [..., 3, H, W] on the same device: (x / 255 - mean) / std.

    A byte has only 256 values, so the results are looked up in a table that is computed on the CPU. They
    are bit-identical to those of torchvision's ToTensor and Normalize on every device; CUDA itself would
    multiply by 1 / 255.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        table = _table(self.mean, self.std, pixels.device)
        # on a CPU, permuting bytes before the conversion is faster than permuting integers
        indices = pixels.movedim(-1, -3).contiguous().to(torch.int32)
        offsets = torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=pixels.device)
        indices += offsets[:, None, None]  # each channel has its own 256 entries of the table
        return table.index_select(0, indices.flatten()).view(indices.shape)


@functools.cache
def _table(mean: tuple, std: tuple, device: torch.device) -> torch.Tensor:
    """Return float32 [3 * 256] on `device`: the normalised value of each byte of each channel."""
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None] for values in (mean, std))
    return ((torch.arange(256, dtype=torch.float32) / 255 - mean) / std).flatten().to(device)
