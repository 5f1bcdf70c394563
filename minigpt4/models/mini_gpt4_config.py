"""The section `model` of a configuration: its keys, their defaults, and what can be wrong with their values."""

import re
from dataclasses import dataclass, field
from typing import Any

from minigpt4.common.config import REQUIRED, Problem
from minigpt4.common.utils import weights_problem
from minigpt4.models.base_model import DTYPES
from minigpt4.models.llm.language_model import folder_problems
from minigpt4.models.llm.quantization import KINDS, kind_of
from minigpt4.models.projector import KINDS as PROJECTORS
from minigpt4.models.training_parts import TrainConfig, mode_problems, modes
from minigpt4.models.vision.eva_vit import VIT_MODELS
from minigpt4.models.vision.merging import GROUPS
from minigpt4.models.vision.towers import tower_problems, unknown_tower
from minigpt4.text.prompts import prompt_problems

NEW = "new"  # as q_former_model: a Q-Former that is not trained yet
# Source: BLIP-2.
BLIP2_FILES = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"


@dataclass
class MiniGPT4Config:
    """Every key of the section `model`, with its default."""

    arch: str = "mini_gpt4"
    model_type: str = "pretrain_vicuna"
    # vision encoder
    vision_model: str = (
        ""  # folder of transformers, or name of timm with its file as vit_ckpt; empty: vit_model
    )
    vit_model: str = "eva_clip_g"
    vit_ckpt: str = f"{BLIP2_FILES}/eva_vit_g.pth"  # path or URL
    image_size: int | None = None  # None: that of the vision tower
    drop_path_rate: float = 0.0
    use_grad_checkpoint: bool = False  # of the ViT
    vit_precision: str = (
        "fp16"  # fp32: full linear layers; trained ones (freeze_vit: False) always are
    )
    freeze_vit: bool = True  # and ln_vision
    # from patches to vectors of the LLM
    bridge: str | None = (
        None  # qformer | merged: four neighbours joined | none: patches as they are; None: has_qformer
    )
    has_qformer: bool = True  # False: merged
    q_former_model: str = (
        f"{BLIP2_FILES}/blip2_pretrained_flant5xxl.pth"  # path or URL; new: random, to be trained
    )
    num_query_token: int = 32
    freeze_qformer: bool = True  # and query_tokens
    projector: str = "linear"  # mlp2x_gelu: two layers
    # language model
    llama_model: str = REQUIRED  # transformers folder
    llm_precision: str = "auto"  # fp16 on a GPU; on a CPU bf16 where it has units for it, else fp32
    llm_quantization: str = "none"  # weights of the LLM in 8 bits (int8) or 4 (nf4, int4)
    low_resource: bool = False  # the key of 2023: llm_quantization int8
    device_8bit: int | str = 0  # GPU of the quantised LLM; scripts of 2023 also name a device
    device_map: str = (
        "none"  # auto, or another of accelerate's: spreads the LLM of a chat over all GPUs
    )
    check_llm: bool = True  # refuse an LLM that does not read English
    llm_checkpointing: bool = (
        False  # layers computed again for backward: less memory, half as much work more
    )
    use_grad_checkpoint_llm: bool = False  # the newest release's name of the same
    lora_r: int = (
        0  # rank of trained updates of the LLM's query and value projections; 0: the LLM is frozen
    )
    lora_alpha: int = 16  # they count alpha / r
    # frozen | full | lora of each part; rates: run.lr
    train: TrainConfig = field(default_factory=TrainConfig)
    # the ViT's blocks, and what lies between the LLM's matrix products; needs a C++ compiler. None: in a training on a
    # GPU, where it works
    compile: bool | None = None
    # steps recorded as CUDA graphs, for which a GPU needs a step's memory twice; of frozen vision side and LLM. None: in
    # a training on a GPU whose model is compiled
    cuda_graphs: bool | None = None
    # text
    prompt_path: str = ""
    prompt_template: str | None = (
        None  # one {} for the prompt; None: the tokenizer's own chat template, if it has one
    )
    chat_template: bool = (
        False  # an `instruction_input` of the newest release's data goes into prompt_template
    )
    max_context_len: int = 3800  # tokens of a prompt, images included
    max_txt_len: int = 32  # tokens of a caption, end symbol included
    end_sym: str = "\n"
    mask_eos_labels: bool = (
        True  # 2023: an end token in the text is no target; False where end_sym is the end token
    )
    pack_sequences: bool = (
        True  # texts of a batch without padding, where the LLM can; same loss and gradient
    )
    # a chat, unless it says otherwise
    repetition_penalty: float = 1.0  # of answers
    reads_boxes: bool = (
        False  # it was trained on MiniGPT-v2's task identifiers and boxes: the demo offers them
    )
    # MiniGPT-4 checkpoint to start from, path or URL
    ckpt: str = ""

    READ_PATHS = (
        "vision_model",
        "vit_ckpt",
        "q_former_model",
        "llama_model",
        "prompt_path",
        "ckpt",
    )

    DEAD_KEYS = {
        "prompt": "training prompts come from model.prompt_path",
        "finetuned": "set model.ckpt",
        "pretrained": "set model.ckpt",
        "load_finetuned": "set model.ckpt",
    }


_CHOICES = {
    "vit_precision": ("fp16", "fp32"),
    "llm_precision": ("auto", *DTYPES),
    "llm_quantization": KINDS,
    "device_map": ("none", "auto", "balanced", "balanced_low_0", "sequential"),  # of accelerate
    "bridge": (None, "qformer", *GROUPS),
    "projector": PROJECTORS,
}
# key -> {a choice of earlier versions: why it is gone, and what to take}
_REMOVED = {
    "llm_quantization": {
        "fp8": "fp8 was removed, since it trained slower than fp16; take int8, which needs as little memory "
        "and is closer to fp16: figures are in docs/performance.md"
    }
}


def find_problems(cfg: MiniGPT4Config, where: str) -> list[Problem]:
    """Return all that is wrong with the section; nothing is loaded."""
    problems = []
    if not cfg.vision_model and cfg.vit_model not in VIT_MODELS:  # own code may add to it
        problems.append(Problem(f"{where}.vit_model", unknown_tower(cfg.vit_model)))
    problems += _choice_problems(cfg, where)
    if cfg.device_map != "none" and (
        kind := kind_of(cfg.llm_quantization, cfg.low_resource)
    ) not in ("none", "nf4"):
        message = f"the LLM in {kind} lies on one device; to spread it, take model.llm_quantization none or nf4"
        problems.append(Problem(f"{where}.device_map", message))
    if not re.fullmatch(r"\d+|cpu|cuda(:\d+)?", str(cfg.device_8bit)):
        problems.append(
            Problem(f"{where}.device_8bit", f"'{cfg.device_8bit}'; expected the number of a GPU")
        )
    for key in ("image_size", "num_query_token", "lora_alpha", "max_context_len", "max_txt_len"):
        if cfg.get(key) is not None and cfg.get(key) < 1:
            problems.append(Problem(f"{where}.{key}", f"{cfg.get(key)}; expected at least 1"))
    if cfg.lora_r < 0:
        problems.append(
            Problem(f"{where}.lora_r", f"{cfg.lora_r}; expected a rank, or 0 for a frozen LLM")
        )
    problems += [
        Problem(f"{where}.llama_model", message) for message in folder_problems(cfg.llama_model)
    ]
    problems += tower_problems(cfg, where, MiniGPT4Config.vit_ckpt)
    if bridge_of(cfg) == "qformer" and cfg.q_former_model != NEW:
        problems += filter(None, [weights_problem(cfg.q_former_model, f"{where}.q_former_model")])
    if cfg.ckpt:
        problems += filter(None, [weights_problem(cfg.ckpt, f"{where}.ckpt")])
    problems += mode_problems(cfg, where, bridge_of(cfg))
    if cfg.cuda_graphs:
        problems += recording_problems(cfg, where)
    if (
        cfg.q_former_model == NEW
        and bridge_of(cfg) == "qformer"
        and modes(cfg)["bridge"] == "frozen"
    ):
        problems.append(
            Problem(
                f"{where}.q_former_model", f"{NEW}: it is random; set {where}.train.bridge=full"
            )
        )
    return problems + prompt_problems(cfg.prompt_path, cfg.prompt_template or "", where)


def recording_problems(cfg: MiniGPT4Config, where: str) -> list[Problem]:
    """Return why steps of the section cannot be recorded as CUDA graphs."""
    trained = [part for part in ("vision", "bridge", "llm") if modes(cfg)[part] != "frozen"]
    reasons = [f"model.train.{part} is {modes(cfg)[part]}" for part in trained]
    if kind_of(cfg.llm_quantization, cfg.low_resource) == "nf4":
        reasons.append("model.llm_quantization is nf4")
    if cfg.llm_checkpointing or cfg.use_grad_checkpoint_llm:
        reasons.append("model.llm_checkpointing is True")
    return [
        Problem(f"{where}.cuda_graphs", f"{reason}, which is not recorded; set it to False")
        for reason in reasons
    ]


def _choice_problems(cfg: MiniGPT4Config, where: str) -> list[Problem]:
    problems = []
    for key, choices in _CHOICES.items():
        if (value := cfg.get(key)) in choices:
            continue
        message = f"'{value}' is not one of {', '.join(filter(None, choices))}"
        if hint := _REMOVED.get(key, {}).get(value):
            message += f"; {hint}"
        problems.append(Problem(f"{where}.{key}", message))
    return problems


def bridge_of(cfg: Any) -> str:
    """Return what stands between tower and projection: qformer, merged or none."""
    return cfg.bridge or ("qformer" if cfg.has_qformer else "merged")
