"""The energy that this GPU has used, read from the driver's own library (NVML), without any package."""

import ctypes
from collections.abc import Callable
from contextlib import suppress

import torch


def joules() -> Callable[[], float] | None:
    """Return a function that gives the joules this GPU has used so far; None where the driver does not report them."""
    with suppress(OSError):
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        device, used = ctypes.c_void_p(), ctypes.c_ulonglong()
        # NVML sees all GPUs of the machine, whatever CUDA_VISIBLE_DEVICES says
        identity = f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode()
        if (
            nvml.nvmlInit_v2() == 0
            and nvml.nvmlDeviceGetHandleByUUID(identity, ctypes.byref(device)) == 0
        ):

            def read() -> float:
                nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(used))
                return used.value / 1000

            if nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(used)) == 0:
                return read
    return None
