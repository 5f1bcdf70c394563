"""The plugin for lmms-eval: `pip install .` registers the model `minigpt4` with it, see docs/evaluation.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

HERE = "minigpt4.evaluation.lmms.models"


def manifest() -> ModelManifest:
    """Return the manifest that lmms-eval expects of an entry point `lmms_eval.models`; it imports the models on use."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        "minigpt4", f"{HERE}.MiniGPT4Simple", f"{HERE}.MiniGPT4Chat", aliases=("mini_gpt4",)
    )
