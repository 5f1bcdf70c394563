"""The four parts of a model, and what trains of each: the section `model.train`, or 2023's keys."""

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
    """What trains of each part: frozen, full, or lora (updates of rank `lora_r`). None: as 2023's keys say."""

    vision: str | None = None  # freeze_vit
    bridge: str | None = None  # freeze_qformer
    projector: str | None = None  # full
    llm: str | None = None  # lora where lora_r is above 0, else frozen


def modes(cfg: Any) -> dict[str, str]:
    """Return {part: one of MODES} of a `model` section."""
    older = {
        "vision": "frozen" if cfg.freeze_vit else "full",
        "bridge": "frozen" if cfg.freeze_qformer else "full",
        "projector": "full",
        "llm": "lora" if cfg.lora_r else "frozen",
    }
    return {part: cfg.train[part] or mode for part, mode in older.items()}


def part_of(name: str) -> str | None:
    """Return which of PARTS a parameter belongs to, by its name; None for one of a subclass's own."""
    top = name.partition(".")[0]
    return next((part for part, names in PARTS.items() if top in names), None)


def mode_problems(cfg: Any, where: str, bridge: str) -> list[Problem]:
    """Return what of the section `train` cannot be, of a checked section otherwise."""
    problems = []

    def check(is_wrong: bool, part: str, message: str) -> None:
        if is_wrong:
            problems.append(Problem(f"{where}.train.{part}", f"{cfg.train[part]}; {message}"))

    for part in PARTS:
        check(cfg.train[part] not in (None, *MODES), part, f"expected one of {', '.join(MODES)}")
    if problems:
        return problems
    found = modes(cfg)
    for part in ("vision", "bridge", "projector"):
        check(found[part] == "lora", part, "LoRA is for the LLM alone; expected frozen or full")
    check(
        cfg.train.bridge == "full" and bridge != "qformer",
        "bridge",
        f"the bridge {bridge} has no weights",
    )
    check(
        found["projector"] == "frozen" and not cfg.ckpt,
        "projector",
        f"it is random without {where}.ckpt; name one",
    )
    check(
        found["llm"] == "lora" and not cfg.lora_r,
        "llm",
        f"needs a rank: set {where}.lora_r, e.g. 64",
    )
    message = f"{where}.lora_r is {cfg.lora_r}; set it to 0, or train.llm to lora"
    check(found["llm"] != "lora" and cfg.lora_r > 0, "llm", message)
    is_packed = cfg.llm_quantization != "none" or cfg.low_resource
    check(
        found["llm"] == "full" and is_packed,
        "llm",
        f"weights in 8 or 4 bits do not train; set {where}.train.llm lora",
    )
    trained = [
        part
        for part in PARTS
        if found[part] != "frozen" and not (part == "bridge" and bridge != "qformer")
    ]
    check(not trained, "projector", "all parts are frozen: nothing would train")
    return problems


def mode_table(
    modes: Mapping[str, str], parts: list[Any], rates: Mapping[str, float | None]
) -> str:
    """Return a table of what trains: mode, peak learning rate, parameters. `parts`: those of `BaseModel.parts()`."""
    rows = [("part", "train", "lr", "trainable", "of")]
    for part, mode in modes.items():
        own = [row for row in parts if row.name in PARTS[part]]
        trainable, total = sum(row.trainable for row in own), sum(row.parameters for row in own)
        rate = f"{rates[part]:g}" if trainable and rates.get(part) is not None else "-"
        rows.append((part, mode if own else "absent", rate, f"{trainable:,}", f"{total:,}"))
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = (
        f"{{:<{sizes[0]}}}  {{:<{sizes[1]}}}  {{:>{sizes[2]}}}  {{:>{sizes[3]}}}  {{:>{sizes[4]}}}"
    )
    return "\n".join(line.format(*row).rstrip() for row in rows)
