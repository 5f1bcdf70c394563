"""What a result was measured on."""

import importlib.metadata
import os
import platform


def description(*libraries):
    """Return {"machine": .., "versions": ..} for a result file; torch and Python are always among the versions."""
    import torch

    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    machine |= {"threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    versions = {name: importlib.metadata.version(name) for name in ("torch", *libraries)}
    return {"machine": machine, "versions": {"python": platform.python_version(), **versions}}
