"""Warnings, each logged once, of texts that are longer than the limits of the section `model`."""

import logging
from functools import lru_cache


@lru_cache
def warn_of_cut(max_txt_len: int) -> None:
    """Warn once that conversations are longer than `model.max_txt_len`."""
    logging.warning(
        f"a conversation is longer than model.max_txt_len={max_txt_len} tokens: its last turns are cut off. Said once; "
        "python -m minigpt4.datasets.inspect counts them all"
    )


@lru_cache
def warn_of_cut_prompt(max_context_len: int) -> None:
    """Warn once that prompts are longer than `model.max_context_len`."""
    logging.warning(
        f"a prompt is longer than model.max_context_len={max_context_len} tokens: its end is cut off, with what the "
        "template puts behind the question. Said once"
    )
