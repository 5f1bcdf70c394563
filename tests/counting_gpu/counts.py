"""What the counting GPU has counted, asked from within a process that runs on it."""

import ctypes
import os
import tempfile
from typing import NamedTuple


class Counts(NamedTuple):
    """Of the host's calls since `reset`."""

    launches: int  # of kernels and matrix products
    waits: int  # of the host for the device, as for a value that is read
    copies: int  # to the device
    flops: int  # of matrix products
    nodes: list[int]  # of each graph that was recorded
    beside: int  # launches on other streams while a graph was recorded


def reset() -> None:
    """Begin to count."""
    _library().fc_reset()


def counts() -> Counts:
    """Return what was counted since."""
    with tempfile.NamedTemporaryFile("r") as file:
        _library().fc_dump(file.name.encode())
        rows = [line.rstrip("\n").split("\t") for line in file]
    found = [(int(number), int(size), name) for number, size, name in rows]

    def number(*beginnings: str) -> int:
        return sum(count for count, _, name in found if name.startswith(beginnings))

    waits = number("SYNC", "cudaFree")
    copies = number("memcpy pageable -> device", "memcpy pinned -> device")
    flops = sum(size for _, size, name in found if name.startswith("gemm"))
    nodes = [int(name.split()[3]) for _, _, name in found if name.startswith("capture ends with")]
    beside = number("launch beside a capture")
    return Counts(number("kernel", "gemm"), waits, copies, flops, nodes, beside)


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ["LD_PRELOAD"])
