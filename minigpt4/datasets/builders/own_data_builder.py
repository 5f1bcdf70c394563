"""Builders for the user's own data, chosen by a section's key `builder`: a folder of images, or an annotation file."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt4.common.registry import registry
from minigpt4.common.utils import expand_path
from minigpt4.datasets.builders.base_dataset_builder import (
    BaseDatasetBuilder,
    BuildInfo,
    DatasetConfig,
)
from minigpt4.datasets.datasets.annotations import Fault, Record, read_records
from minigpt4.datasets.datasets.image_text_dataset import (
    ImageTextDataset,
    check_images,
    read_folder,
)


class OwnDataBuilder(BaseDatasetBuilder):
    """Builds an ImageTextDataset; a subclass implements the class method `records`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if inspect.isfunction(vars(cls).get("records")):
            raise TypeError(
                f"{cls.__qualname__}.records: write @classmethod above it; it is also called by --dry-run"
            )

    def build_train_dataset(self, storage: str) -> ImageTextDataset:
        records, folder = self.records(self.config["build_info"])
        vis, text = self.vis_processors["train"], self.text_processors["train"]
        return ImageTextDataset(records, folder, vis, text, self.name)

    @classmethod
    def check_data(cls, info: Mapping) -> None:
        check_images(*cls.records(info))

    @classmethod
    def records(cls, info: Mapping) -> tuple[list[Record | Fault], Path]:
        """Return (records, image folder) for a section's `build_info` or `val`. Raises OSError or ValueError."""
        raise NotImplementedError(f"{cls.__name__}.records")


@registry.register_builder("image_text_folder")
class ImageTextFolderBuilder(OwnDataBuilder):
    """Images in the folder `build_info.storage` and below, each with a .txt file beside it or in a captions file."""

    name = "image_text_folder"
    DATASET_CONFIG_DICT = {"default": "configs/datasets/image_text_folder/defaults.yaml"}
    EXPECTED = "the path of a folder of images"

    @classmethod
    def records(cls, info: Mapping) -> tuple[list[Record | Fault], Path]:
        folder = expand_path(info["storage"])
        if not folder.is_dir():
            raise FileNotFoundError(2, "no folder", str(folder))
        return read_folder(folder), folder


@dataclass
class AnnotationsInfo(BuildInfo):
    # the folder that image paths are relative to; by default that of the annotation file
    images: str | None = None

    READ_PATHS = ("storage", "images")


@dataclass
class AnnotationsConfig(DatasetConfig):
    build_info: AnnotationsInfo = field(default_factory=AnnotationsInfo)
    val: AnnotationsInfo | None = None


@registry.register_builder("image_text_jsonl")
class ImageTextJsonlBuilder(OwnDataBuilder):
    """An annotation file: JSON lines, a JSON list, COCO captions, LLaVA conversations, CSV or TSV."""

    name = "image_text_jsonl"
    Config = AnnotationsConfig
    DATASET_CONFIG_DICT = {"default": "configs/datasets/image_text_jsonl/defaults.yaml"}
    EXPECTED = "the path of an annotation file"

    @classmethod
    def records(cls, info: Mapping) -> tuple[list[Record | Fault], Path]:
        path = expand_path(info["storage"])
        folder = expand_path(info["images"]) if info.get("images") else path.parent
        if not folder.is_dir():
            raise ValueError(f"no folder at '{folder}' for the images; set build_info.images to it")
        return read_records(path, folder), folder
