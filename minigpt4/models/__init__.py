"""Models, found by `model.arch`. Add yours to the imports and to __all__."""

from typing import Any

import torch

from minigpt4.common.registry import registry
from minigpt4.models.base_model import BaseModel
from minigpt4.models.mini_gpt4 import MiniGPT4

__all__ = ["BaseModel", "MiniGPT4", "load_model"]


def load_model(cfg: Any, device: torch.device | str | None = None) -> BaseModel:
    """Return the model of a checked `model` section, ready to use."""
    return registry.get_model_class(cfg.arch).from_config(cfg, device=device)
