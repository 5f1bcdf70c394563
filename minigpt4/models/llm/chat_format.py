"""The prompt template of a `model` section that names none: that of the tokenizer's chat template."""

import logging
from pathlib import Path
from typing import Any

from minigpt4.common.utils import expand_path, read_json
from minigpt4.models.llm.language_model import load_tokenizer
from minigpt4.models.mini_gpt4_config import MiniGPT4Config
from minigpt4.text.templates import read_chat_template


def settle(cfg: Any) -> None:
    """If `prompt_template` is None, set it, `end_sym` and `mask_eos_labels` from the tokenizer's chat template.

    Without a chat template, `prompt_template` becomes "". Raises ValueError for a chat template that cannot be used.
    """
    folder = cfg.get("llama_model")
    if cfg.prompt_template is not None or not folder:
        return
    cfg.prompt_template = ""
    if not _has_template(expand_path(folder)):
        return
    cfg.prompt_template, end_sym = read_chat_template(load_tokenizer(folder))
    if cfg.end_sym not in (MiniGPT4Config.end_sym, end_sym):
        logging.warning(
            "model.end_sym: %r is replaced by %r of the tokenizer's chat template; to keep it, set model.prompt_template "
            "too",
            cfg.end_sym,
            end_sym,
        )
    cfg.end_sym = end_sym
    cfg.mask_eos_labels = False  # the LLM has to learn where an answer ends
    logging.info(
        "model.prompt_template: %r, end_sym %r, from the chat template of the tokenizer",
        cfg.prompt_template,
        cfg.end_sym,
    )


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return bool(read_json(folder / "tokenizer_config.json").get("chat_template"))
    # a missing or damaged tokenizer is reported elsewhere
    except (OSError, ValueError, AttributeError):
        return False
