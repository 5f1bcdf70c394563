"""MiniGPT-v2: larger images, merged patches, and LoRA in the LLM, which trains together with the projection."""

from dataclasses import dataclass

from minigpt4.common.registry import registry
from minigpt4.models.mini_gpt4 import MiniGPT4
from minigpt4.models.mini_gpt4_config import MiniGPT4Config


@dataclass
class MiniGPTv2Config(MiniGPT4Config):
    """The keys of MiniGPT-4, with MiniGPT-v2's defaults."""

    arch: str = "minigpt_v2"
    model_type: str = "pretrain"
    image_size: int | None = 448
    has_qformer: bool = False
    lora_r: int = 64
    prompt_template: str = "[INST] {} [/INST]"
    max_txt_len: int = 300
    mask_eos_labels: bool = False
    repetition_penalty: float = 1.05
    reads_boxes: bool = True


@registry.register_model("minigpt_v2")
class MiniGPTv2(MiniGPT4):
    """ViT of 448 pixels -> ln_vision -> merged patches -> llama_proj -> LLM with LoRA."""

    Config = MiniGPTv2Config
    PRETRAINED_MODEL_CONFIG_DICT = {"pretrain": "configs/models/minigpt_v2.yaml"}
