"""Builders: a section `datasets.<name>` of the configuration -> a dataset.

To add one, subclass BaseDatasetBuilder, register it, and import it here; its defaults can be in a YAML file.
"""

from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from minigpt4.datasets.builders.image_text_pair_builder import (
    CCSBUAlignBuilder,
    CCSBUBuilder,
    LaionBuilder,
    WebDatasetBuilder,
)
from minigpt4.datasets.builders.instruction_builder import InstructionBuilder
from minigpt4.datasets.builders.own_data_builder import (
    ImageTextFolderBuilder,
    ImageTextJsonlBuilder,
)

__all__ = [
    "BaseDatasetBuilder",
    "CCSBUAlignBuilder",
    "CCSBUBuilder",
    "ImageTextFolderBuilder",
    "ImageTextJsonlBuilder",
    "InstructionBuilder",
    "LaionBuilder",
    "WebDatasetBuilder",
]
