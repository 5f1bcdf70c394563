"""Builders for own data, named by a section's key `builder`: a folder of images, or an annotation file."""

from dataclasses import dataclass, field

from minigpt4.common.registry import registry
from minigpt4.common.utils import expand_path
from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder, BuildInfo, DatasetConfig
from minigpt4.datasets.datasets.annotations import read_records
from minigpt4.datasets.datasets.image_text_dataset import ImageTextDataset, check_pictures, read_folder


class OwnDataBuilder(BaseDatasetBuilder):
    """Reads the records in `records`; a subclass says where they and the images are."""

    def build_train_dataset(self, storage):
        records, folder = self.records(self.config["build_info"])
        vis, text = self.vis_processors["train"], self.text_processors["train"]
        return ImageTextDataset(records, folder, vis, text, self.name)

    @classmethod
    def preflight(cls, cfg, where):
        problems = super().preflight(cfg, where)
        key = f"{where}.build_info.storage"
        if not isinstance(cfg["build_info"]["storage"], str):
            return [*problems, f"{key}: {cfg['build_info']['storage']!r}; expected {cls.EXPECTED}"]
        try:
            check_pictures(*cls.records(cfg["build_info"]))
        except FileNotFoundError as error:
            problems.append(f"{key}: nothing at '{error.filename}'; expected {cls.EXPECTED}")
        except (OSError, ValueError) as error:
            problems.append(f"{key}: {error}")
        return problems

    @classmethod
    def records(cls, build_info):
        """Return (Records and Faults, image folder). Raises OSError or ValueError."""
        raise NotImplementedError(f"{cls.__name__}.records")


@registry.register_builder("image_text_folder")
class ImageTextFolderBuilder(OwnDataBuilder):
    """Images in `build_info.storage` and below, each with a .txt file beside it or a line in a captions file."""

    name = "image_text_folder"
    DATASET_CONFIG_DICT = {"default": "configs/datasets/image_text_folder/defaults.yaml"}
    EXPECTED = "the path of a folder of images"

    @classmethod
    def records(cls, build_info):
        folder = expand_path(build_info["storage"])
        if not folder.is_dir():
            raise FileNotFoundError(2, "no folder", str(folder))
        return read_folder(folder), folder


@dataclass
class AnnotationsInfo(BuildInfo):
    images: str | None = None  # folder that the images' paths start from; by default that of the annotation file


@dataclass
class AnnotationsConfig(DatasetConfig):
    build_info: AnnotationsInfo = field(default_factory=AnnotationsInfo)


@registry.register_builder("image_text_jsonl")
class ImageTextJsonlBuilder(OwnDataBuilder):
    """An annotation file: JSON lines, a JSON list, COCO captions, LLaVA conversations, CSV or TSV."""

    name = "image_text_jsonl"
    Config = AnnotationsConfig
    DATASET_CONFIG_DICT = {"default": "configs/datasets/image_text_jsonl/defaults.yaml"}
    EXPECTED = "the path of an annotation file"

    @classmethod
    def records(cls, build_info):
        path = expand_path(build_info["storage"])
        folder = expand_path(build_info["images"]) if build_info["images"] else path.parent
        if not folder.is_dir():
            raise ValueError(f"no folder at '{folder}' for the images; set build_info.images to it")
        return read_records(path, folder), folder
