"""torch.compile: does it work on a device, and how this project's kernels are compiled."""

import os
from collections.abc import Callable
from typing import Any

import torch

from minigpt4.common.utils import user_cache

# In which order a row is added up is not tried out on the GPU, where another process could find another order quicker.
_OPTIONS = {"deterministic": True}


def kernel(function: Callable, **options: Any) -> Callable:
    """Return `function` compiled at its first call; `options` are those of torch.compile."""
    _keep()
    return torch.compile(function, options=_OPTIONS, **options)


def compile_module(module: torch.nn.Module) -> None:
    """Let `module` be compiled when it first runs."""
    module.compile(options=_OPTIONS)


def obstacle(device: torch.device) -> str | None:
    """Return why torch.compile does not work on `device`, None if it does."""
    try:
        _keep()
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # of many kinds, from Dynamo to the linker
        return str(error).strip().splitlines()[0]
    return None


def _keep() -> None:
    """Keep what is compiled for later processes in the user's cache folder: torch's own, in /tmp, ends with a job."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(user_cache("minigpt4/compiled")))
