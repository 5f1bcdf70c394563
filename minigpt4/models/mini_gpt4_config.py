"""The section `model` of a configuration: its keys with their defaults, and the checks of their values."""

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

PENALTIES = (1e-3, 1e3)  # repetition penalties: lowest, highest
NEW = "new"  # value of q_former_model: a new Q-Former with random weights
# Source: BLIP-2.
BLIP2_FILES = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2"


@dataclass
class MiniGPT4Config:
    """The keys of the section `model`, with their defaults."""

    arch: str = "mini_gpt4"
    model_type: str = "pretrain_vicuna"

    # vision encoder
    # transformers folder, or name of a timm model whose file is vit_ckpt; empty: vit_model
    vision_model: str = ""
    vit_model: str = "eva_clip_g"
    vit_ckpt: str = f"{BLIP2_FILES}/eva_vit_g.pth"  # path or URL
    image_size: int | None = None  # None: that of the vision tower
    drop_path_rate: float = 0.0
    use_grad_checkpoint: bool = False  # of the ViT
    # fp16: linear layers in half precision | fp32; those that train (freeze_vit: False) are always in fp32
    vit_precision: str = "fp16"
    freeze_vit: bool = True  # and ln_vision

    # from the patches to vectors for the LLM
    # qformer | merged: four neighbouring patches joined | none: single patches; None: as has_qformer says
    bridge: str | None = None
    has_qformer: bool = True  # False: merged
    # path or URL; new: random weights, to be trained
    q_former_model: str = f"{BLIP2_FILES}/blip2_pretrained_flant5xxl.pth"
    num_query_token: int = 32
    freeze_qformer: bool = True  # and query_tokens
    projector: str = "linear"  # mlp2x_gelu: two layers

    # language model
    llama_model: str = REQUIRED  # transformers folder
    # auto: fp16 on a GPU; on a CPU bf16 if it has instructions for it, else fp32
    llm_precision: str = "auto"
    llm_quantization: str = "none"  # weights of the LLM in 8 bits (int8) or 4 bits (nf4, int4)
    low_resource: bool = False  # key of 2023: llm_quantization int8
    # GPU of the quantised LLM in scripts of 2023, which give `from_config` no device; they also name a device
    device_8bit: int | str = 0
    # auto or another of accelerate's: spread the LLM of a chat over all GPUs
    device_map: str = "none"
    check_llm: bool = True  # refuse an LLM that does not read English
    # activation checkpointing: less memory, half as much computation more
    llm_checkpointing: bool = False
    use_grad_checkpoint_llm: bool = False  # the same, in the newest release
    lora_r: int = 0  # rank of LoRA in the LLM's query and value projections; 0: no LoRA
    lora_alpha: int = 16  # LoRA is scaled by alpha / r
    # frozen | full | lora, for each part; their learning rates: run.lr
    train: TrainConfig = field(default_factory=TrainConfig)
    # compile the ViT's blocks, and the operations between the LLM's matrix products; needs a C++ compiler. None: on, for
    # training on a GPU where it works
    compile: bool | None = None
    # record steps as CUDA graphs, with a frozen vision side and LLM; the GPU needs a step's memory twice. None: on, for
    # training on a GPU with a compiled model
    cuda_graphs: bool | None = None

    # text
    prompt_path: str = ""
    # with one {} for the prompt; None: that of the tokenizer's own chat template, if it has one, which then also sets
    # end_sym and mask_eos_labels
    prompt_template: str | None = None
    # whether an `instruction_input` of the newest release's data is put into prompt_template
    chat_template: bool = False
    max_context_len: int = 3800  # tokens of a prompt, images included
    max_txt_len: int = 32  # tokens of a caption, end symbol included
    end_sym: str = "\n"
    # as in 2023, an end token in the text is no target; set it to False if end_sym is the end token
    mask_eos_labels: bool = True
    # train on the texts of a batch without padding, if the LLM supports it; same loss and gradient
    pack_sequences: bool = True

    # defaults of a chat
    repetition_penalty: float = 1.0  # of answers
    # trained on MiniGPT-v2's task identifiers and boxes: the demo offers them
    reads_boxes: bool = False

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
# {key: {a choice of earlier versions: why it was removed, and what to use instead}}
_REMOVED = {
    "llm_quantization": {
        "fp8": "fp8 was removed, since it trained slower than fp16; take int8, which needs as little memory "
        "and is closer to fp16: figures are in docs/performance.md"
    }
}


def find_problems(cfg: MiniGPT4Config, where: str) -> list[Problem]:
    """Return everything that is wrong with the section; loads nothing."""
    problems = []
    # single values
    if (
        not cfg.vision_model and cfg.vit_model not in VIT_MODELS
    ):  # users' code may add to VIT_MODELS
        problems.append(Problem(f"{where}.vit_model", unknown_tower(cfg.vit_model)))
    problems += _choice_problems(cfg, where)
    kind = kind_of(cfg.llm_quantization, cfg.low_resource)
    if cfg.device_map != "none" and kind not in ("none", "nf4"):
        message = f"the LLM in {kind} lies on one device; to spread it, take model.llm_quantization none or nf4"
        problems.append(Problem(f"{where}.device_map", message))
    if not re.fullmatch(r"\d+|cpu|cuda(:\d+)?", str(cfg.device_8bit)):
        problems.append(
            Problem(f"{where}.device_8bit", f"'{cfg.device_8bit}'; expected the number of a GPU")
        )
    problems += _number_problems(cfg, where)
    # files
    problems += [
        Problem(f"{where}.llama_model", message) for message in folder_problems(cfg.llama_model)
    ]
    problems += tower_problems(cfg, where, MiniGPT4Config.vit_ckpt)
    bridge, is_new = bridge_of(cfg), cfg.q_former_model == NEW
    if bridge == "qformer" and not is_new:
        problems += filter(None, [weights_problem(cfg.q_former_model, f"{where}.q_former_model")])
    if cfg.ckpt:
        problems += filter(None, [weights_problem(cfg.ckpt, f"{where}.ckpt")])
    # what trains
    problems += mode_problems(cfg, where, bridge)
    if cfg.cuda_graphs:
        problems += recording_problems(cfg, where)
    if bridge == "qformer" and is_new and modes(cfg)["bridge"] == "frozen":
        message = f"{NEW}: it is random; set {where}.train.bridge=full"
        problems.append(Problem(f"{where}.q_former_model", message))
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
        value = cfg.get(key)
        if value in choices:
            continue
        message = f"'{value}' is not one of {', '.join(filter(None, choices))}"
        if hint := _REMOVED.get(key, {}).get(value):
            message += f"; {hint}"
        problems.append(Problem(f"{where}.{key}", message))
    return problems


def _number_problems(cfg: MiniGPT4Config, where: str) -> list[Problem]:
    expected = {}
    for key in ("image_size", "num_query_token", "lora_alpha", "max_context_len", "max_txt_len"):
        if cfg.get(key) is not None and cfg.get(key) < 1:
            expected[key] = "at least 1"
    if cfg.lora_r < 0:
        expected["lora_r"] = "a rank, or 0 for a frozen LLM"
    if not 0 <= cfg.drop_path_rate < 1:
        expected["drop_path_rate"] = "a number from 0 to below 1"
    lowest, highest = PENALTIES
    if not lowest <= cfg.repetition_penalty <= highest:
        expected["repetition_penalty"] = f"a number from {lowest} to {highest}"
    return [
        Problem(f"{where}.{key}", f"{cfg.get(key)}; expected {text}")
        for key, text in expected.items()
    ]


def bridge_of(cfg: Any) -> str:
    """Return the bridge between vision tower and projection: qformer, merged or none."""
    if cfg.bridge:
        return cfg.bridge
    return "qformer" if cfg.has_qformer else "merged"
