"""MiniGPT-4: one linear layer between a frozen vision encoder and a frozen language model."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Iterable
from typing import TYPE_CHECKING

from minigpt4.common.config import Config
from minigpt4.common.registry import registry

if TYPE_CHECKING:
    from minigpt4.conversation.conversation import Chat, Conversation

__version__ = "1.0.0"


def load(
    cfg_path: str, options: Iterable[str] = (), device: str | None = None
) -> tuple[Chat, Conversation]:
    """Load the model of a YAML file; return (Chat, empty Conversation). Copy the latter for each dialogue.

    chat, conv = minigpt4.load("eval_configs/embedded_eval.yaml", ["model.ckpt=output/checkpoint_0.pth"])
    images = []
    chat.upload_img("image.jpg", conv, images)
    chat.ask("What is in this image?", conv)
    print(chat.answer(conv, images, temperature=0)[0])

    `options` are `--options` of the command line; `device` overrides `run.device`. Raises ConfigError
    with all problems of the configuration, ValueError or OSError for weights that do not fit.
    """
    return load_config(Config(Namespace(cfg_path=cfg_path, options=list(options))), device)


def load_config(cfg: Config, device: str | None = None) -> tuple[Chat, Conversation]:
    """Load the model of a checked Config; return (Chat, empty Conversation) as `load` does."""
    from minigpt4.common.device import resolve_device
    from minigpt4.conversation.conversation import Chat, Conversation, template_for

    device = resolve_device(device or cfg.run_cfg.device)
    section = copy.deepcopy(cfg.model_cfg)
    if "prompt_path" in section:
        section.prompt_path = ""  # only training uses prompts
    model = registry.get_model_class(cfg.model_cfg.arch).from_config(section, device=device)
    processor = cfg.image_processor
    chat = Chat(model, registry.get_processor_class(processor["name"]).from_config(processor))
    conv = Conversation(template_for(cfg.model_cfg.prompt_template, cfg.model_cfg.end_sym))
    chat.check_template(conv.template)
    return chat, conv
