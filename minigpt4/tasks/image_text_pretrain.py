"""Both training stages of MiniGPT-4: the caption's likelihood, given the image."""

from minigpt4.common.registry import registry
from minigpt4.tasks.base_task import BaseTask


@registry.register_task("image_text_pretrain")
class ImageTextPretrainTask(BaseTask):
    """All of it is in BaseTask."""
