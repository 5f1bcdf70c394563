"""The four parts of a model and how each trains: the section `model.train`, or the keys of 2023."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minigpt4.common.config import Problem

PARTS = {
    "vision": ("visual_encoder", "ln_vision"),
    "bridge": ("Qformer", "query_tokens"),
    "projector": ("llama_proj",),
    "llm": ("llama_model",),
}
MODES = ("frozen", "full", "lora")


@dataclass
class TrainConfig:
    """How each part trains: frozen, full, or lora (of rank `lora_r`). None: as the key of 2023 on the right says."""

    vision: str | None = None  # freeze_vit
    bridge: str | None = None  # freeze_qformer
    projector: str | None = None  # full
    llm: str | None = None  # lora where lora_r is above 0, else frozen


def modes(cfg: Any) -> dict[str, str]:
    """Return {part: one of MODES} for a `model` section."""
    defaults = {
        "vision": "frozen" if cfg.freeze_vit else "full",
        "bridge": "frozen" if cfg.freeze_qformer else "full",
        "projector": "full",
        "llm": "lora" if cfg.lora_r else "frozen",
    }
    return {part: cfg.train[part] or default for part, default in defaults.items()}


def part_of(name: str) -> str | None:
    """Return which of PARTS a parameter belongs to, by its name; None for a parameter that a subclass adds."""
    top = name.partition(".")[0]
    return next((part for part, names in PARTS.items() if top in names), None)


def mode_problems(cfg: Any, where: str, bridge: str) -> list[Problem]:
    """Return the problems of the section `train`, given its `model` section named `where` and that section's bridge."""
    problems = []

    def check(is_wrong: bool, part: str, message: str) -> None:
        if is_wrong:
            problems.append(Problem(f"{where}.train.{part}", f"{cfg.train[part]}; {message}"))

    for part in PARTS:
        check(cfg.train[part] not in (None, *MODES), part, f"expected one of {', '.join(MODES)}")
    if problems:  # the checks below need known modes
        return problems
    mode_of = modes(cfg)
    # vision side and projection
    for part in ("vision", "bridge", "projector"):
        check(mode_of[part] == "lora", part, "LoRA is for the LLM alone; expected frozen or full")
    trains_bridge = cfg.train.bridge == "full"
    has_qformer = bridge == "qformer"
    check(trains_bridge and not has_qformer, "bridge", f"the bridge {bridge} has no weights")
    message = f"it is random without {where}.ckpt; name one"
    check(mode_of["projector"] == "frozen" and not cfg.ckpt, "projector", message)
    # the LLM
    message = f"needs a rank: set {where}.lora_r, e.g. 64"
    check(mode_of["llm"] == "lora" and not cfg.lora_r, "llm", message)
    message = f"{where}.lora_r is {cfg.lora_r}; set it to 0, or train.llm to lora"
    check(mode_of["llm"] != "lora" and cfg.lora_r > 0, "llm", message)
    is_quantised = cfg.llm_quantization != "none" or cfg.low_resource
    message = f"weights in 8 or 4 bits do not train; set {where}.train.llm lora"
    check(mode_of["llm"] == "full" and is_quantised, "llm", message)
    # only a Q-Former has weights to train, whatever the bridge's mode
    parts = [part for part in PARTS if part != "bridge" or has_qformer]
    nothing_trains = all(mode_of[part] == "frozen" for part in parts)
    check(nothing_trains, "projector", "all parts are frozen: nothing would train")
    return problems


def mode_table(
    modes: Mapping[str, str], parts: list[Any], rates: Mapping[str, float | None]
) -> str:
    """Return, as text, a table of each part's mode, peak learning rate and numbers of trainable and all parameters.

    `modes`: {part: mode}. `parts`: the result of `BaseModel.parts()`. `rates`: {part: peak learning rate}.
    """
    rows = [("part", "train", "lr", "trainable", "of")]
    for part, mode in modes.items():
        own = [row for row in parts if row.name in PARTS[part]]
        trainable, total = sum(row.trainable for row in own), sum(row.parameters for row in own)
        rate = f"{rates[part]:g}" if trainable and rates.get(part) is not None else "-"
        rows.append((part, mode if own else "absent", rate, f"{trainable:,}", f"{total:,}"))
    # the two names are aligned on the left, the numbers on the right
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    columns = [f"{{:{side}{width}}}" for side, width in zip("<<>>>", widths, strict=True)]
    line = "  ".join(columns)
    return "\n".join(line.format(*row).rstrip() for row in rows)
