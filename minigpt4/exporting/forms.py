"""Which class of transformers can hold a model, as its section `model` describes it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from omegaconf import DictConfig
from torch import nn

from minigpt4.exporting import names
from minigpt4.exporting.blip2 import to_blip2

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedModel


class Form(NamedTuple):
    """A class of transformers: what makes it of a model and the image token's id, and the names of its tensors."""

    build: Callable[[nn.Module, int], "PreTrainedModel"]
    names: tuple[tuple[str, str], ...]


BLIP2 = Form(to_blip2, names.BLIP2)
BY_CLASS = {"Blip2ForConditionalGeneration": BLIP2}


def form_of(section: DictConfig) -> Form:
    """Return the Form of a section `model`. Raises ValueError, with the reason, where no class can hold it."""
    if section.has_qformer:
        return BLIP2
    raise ValueError(
        "model.has_qformer: False; no class of transformers joins neighbouring patches to one vector, as MiniGPT-4 "
        "without Q-Former and MiniGPT-v2 do. Serve the model with `python -m minigpt4.serve`"
    )
