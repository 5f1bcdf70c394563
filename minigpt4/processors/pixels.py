"""Images cross from worker to device as bytes: a quarter of the memory of float32, and the same numbers in the end.

`halves` splits a processor: the dataset applies the first half in the worker
(`BaseDataset.prepare`), `collate` puts the second one into the batch under "normalise", and
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

    `first` gives uint8 [S, S, 3], and `last` makes float32 [..., 3, S, S] of uint8 [..., S, S, 3]. A
    processor whose chain or call is a user's own stays whole: `last` is None.
    """
    is_ours = isinstance(process, BlipImageProcessor)
    if is_ours and type(process).__call__ is BlipImageProcessor.__call__:
        match process.transform.transforms:
            case [*geometry, transforms.ToTensor(), transforms.Normalize(mean=mean, std=std)]:
                first = transforms.Compose([to_rgb, *geometry, to_pixels])
                return first, Normalise(tuple(map(float, mean)), tuple(map(float, std)))
    return process, None


def to_pixels(image: Image.Image) -> torch.Tensor:
    """Return a PIL RGB image as uint8 [H, W, 3], as it lies in memory."""
    return torch.from_numpy(np.array(image))


@dataclass(frozen=True)
class Normalise:
    """Turns uint8 [..., H, W, 3] into float32 [..., 3, H, W] on its device: (x / 255 - mean) / std.

    A byte has 256 values, so this is a table, computed on the CPU and looked up on the device.
    Every device thus gives the numbers of torchvision's ToTensor and Normalize to the last bit;
    CUDA alone would multiply by 1 / 255.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        table = _table(self.mean, self.std, pixels.device)
        # bytes are moved faster than integers, on a CPU
        rows = pixels.movedim(-1, -3).contiguous().to(torch.int32)
        rows += torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=pixels.device)[
            :, None, None
        ]
        return table.index_select(0, rows.flatten()).view(rows.shape)


@functools.cache
def _table(mean: tuple, std: tuple, device: torch.device) -> torch.Tensor:
    """Return float32 [3 * 256] on `device`: what each value of each channel becomes."""
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None] for values in (mean, std))
    return ((torch.arange(256, dtype=torch.float32) / 255 - mean) / std).flatten().to(device)
