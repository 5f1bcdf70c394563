"""The text around questions and answers where a `model` section names none: what the tokenizer's chat template says."""

import logging
from pathlib import Path
from typing import Any

from minigpt4.common.utils import expand_path, read_json
from minigpt4.models.llm.language_model import load_tokenizer
from minigpt4.text.templates import read_chat_template


def settle(cfg: Any) -> None:
    """Set `prompt_template`, if it is None, with `end_sym` and `mask_eos_labels`; '' for a tokenizer without template.

    Raises ValueError for a chat template that cannot be used.
    """
    folder = cfg.get("llama_model")
    if cfg.prompt_template is not None or not folder:
        return
    cfg.prompt_template = ""
    if not _has_template(expand_path(folder)):
        return
    cfg.prompt_template, cfg.end_sym = read_chat_template(load_tokenizer(folder))
    cfg.mask_eos_labels = False  # the end of an answer has to be learnt
    settled = cfg.prompt_template, cfg.end_sym
    logging.info(
        "model.prompt_template: %r, end_sym %r, from the chat template of the tokenizer", *settled
    )


def _has_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return bool(read_json(folder / "tokenizer_config.json").get("chat_template"))
    # no tokenizer is there, or a broken one, which is said elsewhere
    except (OSError, ValueError, AttributeError):
        return False
