"""Which class of transformers can hold a model, as its section `model` describes it."""

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
    """A class of transformers: what makes it of a model and the image token's id; tables of names for the way back."""

    build: Callable[[nn.Module, int], "PreTrainedModel"]
    tables: tuple[names.Table, ...]


BLIP2, LLAVA = Form(to_blip2, (names.BLIP2,)), Form(to_llava, (names.LLAVA_LINEAR, names.LLAVA_MLP))
BY_CLASS = {"Blip2ForConditionalGeneration": BLIP2, "LlavaForConditionalGeneration": LLAVA}


def form_of(section: Any) -> Form:
    """Return the Form of a section `model`. Raises ValueError, with the reason, where no class can hold it."""
    bridge, name = bridge_of(section), name_of(section)
    if bridge == "merged":
        reason = "joins neighbouring patches to one vector, as MiniGPT-4 without Q-Former and MiniGPT-v2 do"
    elif bridge == "qformer" and name in VIT_MODELS and section.projector == "linear":
        return BLIP2
    elif (
        bridge == "none" and is_folder(section) and TransformersVit.of_folder(name).family == SIGLIP
    ):
        family = load_config(section.llama_model).model_type
        if family in LLMS:
            return LLAVA
        reason = f"is Llava with an LLM of the type {family}; it can have {', '.join(LLMS)}"
    else:
        reason = (
            f"has the tower {name} with a norm behind it, this bridge and the projector {section.projector}; "
            "Blip2 has EVA-CLIP, a Q-Former and one layer, Llava has SigLIP and no bridge"
        )
    raise ValueError(
        f"model.bridge: {bridge}; no class of transformers {reason}. Serve it by minigpt4.serve"
    )
