"""Builders for the datasets of MiniGPT-4: `laion` and `cc_sbu` (tar shards, stage 1), `cc_sbu_align` (folder, stage 2).

And `webdataset`, for any other tar shards.
"""

from collections.abc import Mapping
from typing import Any

from minigpt4.common.registry import registry
from minigpt4.common.utils import expand_path
from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from minigpt4.datasets.datasets.caption_datasets import (
    CaptionDataset,
    check_images,
    read_annotations,
)
from minigpt4.datasets.datasets.shard_list import check_shards, expand_shards
from minigpt4.datasets.datasets.web_dataset import WebCaptionDataset
from minigpt4.processors import load_image, load_rgb


class ShardsBuilder(BaseDatasetBuilder):
    """Tar shards as img2dataset writes them. `build_info.storage` is a pattern such as
    /data/laion/{00000..10488}.tar, or a folder of tars."""

    load_image = staticmethod(load_image)

    def build_train_dataset(self, storage: Any) -> WebCaptionDataset:
        vis, text = self.vis_processors["train"], self.text_processors["train"]
        dataset = WebCaptionDataset(storage, vis, text, self.name)
        dataset.load_image = self.load_image
        return dataset

    @classmethod
    def check_data(cls, info: Mapping) -> None:
        check_shards(expand_shards(info["storage"]), info["storage"])


@registry.register_builder("laion")
class LaionBuilder(ShardsBuilder):
    name = "laion"
    DATASET_CONFIG_DICT = {"default": "configs/datasets/laion/defaults.yaml"}
    load_image = staticmethod(load_rgb)


@registry.register_builder("cc_sbu")
class CCSBUBuilder(ShardsBuilder):
    name = "cc_sbu"
    DATASET_CONFIG_DICT = {"default": "configs/datasets/cc_sbu/defaults.yaml"}
    load_image = staticmethod(load_rgb)


@registry.register_builder("webdataset")
class WebDatasetBuilder(ShardsBuilder):
    """Any tar files of images, each with a json or txt file of the same name."""

    name = "webdataset"
    DATASET_CONFIG_DICT = {"default": "configs/datasets/webdataset/defaults.yaml"}


@registry.register_builder("cc_sbu_align")
class CCSBUAlignBuilder(BaseDatasetBuilder):
    """A folder with `filter_cap.json` and `image/<image_id>.jpg` (or .png, .jpeg, .webp).

    Captions are learnt unchanged: a `text_processor` in the section is not applied, because the
    long descriptions of stage 2 need their capitals and punctuation. Source: MiniGPT-4 2023.
    """

    name = "cc_sbu_align"
    DATASET_CONFIG_DICT = {"default": "configs/datasets/cc_sbu/align.yaml"}
    EXPECTED = "the path of a folder"

    def build_train_dataset(self, storage: str) -> CaptionDataset:
        folder = expand_path(storage)
        return CaptionDataset(
            self.vis_processors["train"],
            vis_root=folder / "image",
            ann_paths=[folder / "filter_cap.json"],
            name=self.name,
        )

    @classmethod
    def check_data(cls, info: Mapping) -> None:
        folder = expand_path(info["storage"])
        if not folder.is_dir():
            raise ValueError(
                f"no folder at '{folder}'; expected one with filter_cap.json and image/"
            )
        problems = []
        if not (folder / "filter_cap.json").is_file():
            problems.append(f"'{folder}' has no filter_cap.json")
        if not (folder / "image").is_dir():
            problems.append(f"'{folder}' has no folder image/")
        if problems:
            raise ValueError(*problems)
        check_images(read_annotations(folder / "filter_cap.json"), folder / "image")
