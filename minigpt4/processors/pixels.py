"""An image's last step, from bytes to the float32 tensor that a model takes, where it is left to the device.

A training batch then crosses the worker boundary, and the bus, in a quarter of the bytes.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch


def to_pixels(image):
    """Return a PIL RGB image as uint8 [H, W, 3], as it lies in memory."""
    return torch.from_numpy(np.array(image))


@dataclass(frozen=True)
class Normalise:
    """Turns uint8 [..., H, W, 3] into float32 [..., 3, H, W] on its device: (x / 255 - mean) / std of each channel.

    A byte has 256 values, so this is a table, computed on the CPU and looked up on the device. Every device thus gives
    the numbers of torchvision's ToTensor and Normalize to the last bit; CUDA alone would multiply by 1 / 255.
    """

    mean: tuple
    std: tuple

    def __call__(self, pixels):
        table = _table(self.mean, self.std, pixels.device)
        rows = pixels.movedim(-1, -3).contiguous().to(torch.int32)  # bytes are moved faster than integers, on a CPU
        rows += torch.arange(0, 3 * 256, 256, dtype=torch.int32, device=pixels.device)[:, None, None]
        return table.index_select(0, rows.flatten()).view(rows.shape)


@functools.cache
def _table(mean, std, device):
    """Return float32 [3 * 256] on `device`: what each value of each channel becomes."""
    mean, std = (torch.tensor(values, dtype=torch.float32)[:, None] for values in (mean, std))
    return ((torch.arange(256, dtype=torch.float32) / 255 - mean) / std).flatten().to(device)
