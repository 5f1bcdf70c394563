"""The task of both training stages of MiniGPT-4: the loss of the text, given the image."""

from minigpt4.common.registry import registry
from minigpt4.tasks.base_task import BaseTask


@registry.register_task("image_text_pretrain")
class ImageTextPretrainTask(BaseTask):
    """Everything is inherited from BaseTask."""
