"""Which class of transformers can represent a model, judging by its configuration section `model`."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from minigpt4.exporting import names
from minigpt4.exporting.blip2 import to_blip2
from minigpt4.exporting.llava import LLMS, SIGLIP, to_llava
from minigpt4.models.llm.language_model import load_config
from minigpt4.models.mini_gpt4_config import bridge_of
from minigpt4.models.vision.eva_vit import VIT_MODELS
from minigpt4.models.vision.towers import is_folder, name_of
from minigpt4.models.vision.transformers_vit import TransformersVit

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedModel


class Form(NamedTuple):
    """A class of transformers: `build` makes it from a model and the image token's id, `tables` rename tensors back."""

    build: Callable[[nn.Module, int], "PreTrainedModel"]
    tables: tuple[names.Table, ...]


BLIP2, LLAVA = Form(to_blip2, (names.BLIP2,)), Form(to_llava, (names.LLAVA_LINEAR, names.LLAVA_MLP))
BY_CLASS = {"Blip2ForConditionalGeneration": BLIP2, "LlavaForConditionalGeneration": LLAVA}


def form_of(section: Any) -> Form:
    """Return the Form of a section `model`. Raises ValueError, with the reason, if no class can represent it."""
    bridge, tower = bridge_of(section), name_of(section)
    if bridge == "qformer" and tower in VIT_MODELS and section.projector == "linear":
        return BLIP2
    if bridge == "merged":
        reason = "joins neighbouring patches to one vector, as MiniGPT-4 without Q-Former and MiniGPT-v2 do"
    elif bridge == "none" and _is_siglip(section, tower):
        family = load_config(section.llama_model).model_type
        if family in LLMS:
            return LLAVA
        reason = f"is Llava with an LLM of the type {family}; it can have {', '.join(LLMS)}"
    else:
        reason = (
            f"has the tower {tower} with a norm behind it, this bridge and the projector {section.projector}; "
            "Blip2 has EVA-CLIP, a Q-Former and one layer, Llava has SigLIP and no bridge"
        )
    raise ValueError(
        f"model.bridge: {bridge}; no class of transformers {reason}. Serve it by minigpt4.serve"
    )


def _is_siglip(section: Any, tower: str) -> bool:
    """Return whether the vision tower is a folder of SigLIP."""
    return is_folder(section) and TransformersVit.of_folder(tower).family == SIGLIP
