"""torch.compile: whether it works on a device, and the options with which this project compiles."""

import os
from collections.abc import Callable
from typing import Any

import torch

from minigpt4.common.utils import first_line, user_cache

# No autotuning of reductions: each process could choose another order of summation, depending on measured times.
_OPTIONS = {"deterministic": True}


def kernel(function: Callable, **options: Any) -> Callable:
    """Return `function` to be compiled at its first call; `options` are those of torch.compile."""
    _set_cache_folder()
    return torch.compile(function, options=_OPTIONS, **options)


def compile_module(module: torch.nn.Module) -> None:
    """Let `module` be compiled at its first call."""
    module.compile(options=_OPTIONS)


def obstacle(device: torch.device) -> str | None:
    """Return why torch.compile does not work on `device`, None if it does."""
    try:
        _set_cache_folder()
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:  # of any kind, from Dynamo to the linker
        return first_line(error)
    return None


def _set_cache_folder() -> None:
    """Cache compiled code in the user's cache folder: torch's default, in /tmp, may be lost at the end of a job."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(user_cache("minigpt4/compiled")))
