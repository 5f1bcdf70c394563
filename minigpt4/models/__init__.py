"""Models, found by `model.arch`. Add yours to the imports and to __all__."""

from minigpt4.models.base_model import BaseModel
from minigpt4.models.mini_gpt4 import MiniGPT4
from minigpt4.models.minigpt_base import MiniGPTBase
from minigpt4.models.minigpt_v2 import MiniGPTv2

__all__ = ["BaseModel", "MiniGPT4", "MiniGPTBase", "MiniGPTv2"]
