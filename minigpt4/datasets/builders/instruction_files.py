"""What `build_info` of an instruction dataset names: four layouts of keys, as in the YAML files of MiniGPT-v2."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4.common.config import REQUIRED
from minigpt4.common.utils import expand_path


@dataclass
class TextInfo:
    ann_path: str = REQUIRED

    READ_PATHS = ("ann_path",)


@dataclass
class FilesInfo(TextInfo):
    image_path: str = REQUIRED

    READ_PATHS = ("ann_path", "image_path")


@dataclass
class RefsInfo(FilesInfo):
    dataset: str = REQUIRED  # folder below ann_path; a leading inv is no part of its name
    splitBy: str = REQUIRED  # of refs(<splitBy>).p


@dataclass
class GenomeInfo:
    data_dir: str = REQUIRED

    READ_PATHS = ("data_dir",)


@dataclass
class AnnotationFiles:
    storage: Any = REQUIRED  # path, or a list of paths
    url: Any = None  # where the release downloads them; here only messages name it
    md5: Any = None  # of the release's download; not looked at

    READ_PATHS = ("storage",)


@dataclass
class Annotations:
    train: AnnotationFiles = field(default_factory=AnnotationFiles)


@dataclass
class Images:
    storage: str = REQUIRED  # the folder of the images, or the one above their folder train/

    READ_PATHS = ("storage",)


@dataclass
class SplitsInfo:
    annotations: Annotations = field(default_factory=Annotations)
    images: Images = field(default_factory=Images)


class Files(NamedTuple):
    """What `build_info` names: (key, annotation file)s, the folders to look in for images, and the key of those."""

    annotations: list[tuple[str, Path]]
    folders: list[Path] = []
    folders_key: str = ""
    url: str = ""


def text_files(info: Mapping) -> Files:
    return Files([("ann_path", expand_path(info["ann_path"]))])


def plain_files(info: Mapping) -> Files:
    return Files(
        [("ann_path", expand_path(info["ann_path"]))],
        [expand_path(info["image_path"])],
        "image_path",
    )


def ref_files(info: Mapping) -> Files:
    folder = expand_path(info["ann_path"]) / info["dataset"].removeprefix("inv")
    names = (f"refs({info['splitBy']}).p", "instances.json")
    return Files(
        [("ann_path", folder / name) for name in names],
        [expand_path(info["image_path"])],
        "image_path",
    )


def genome_files(info: Mapping) -> Files:
    folder = expand_path(info["data_dir"])
    names = ("region_descriptions.json", "image_data.json")
    return Files([("data_dir", folder / name) for name in names], [folder], "data_dir")


def split_files(info: Mapping) -> Files:
    """The release looks in train/ alone, its guide puts the images beside it: both are looked in."""
    key, train = "annotations.train.storage", info["annotations"]["train"]
    paths = train["storage"] if not isinstance(train["storage"], str) else [train["storage"]]
    images, urls = expand_path(info["images"]["storage"]), train.get("url") or ""
    url = urls if isinstance(urls, str) else ", ".join(urls)
    return Files(
        [(key, expand_path(path)) for path in paths],
        [images / "train", images],
        "images.storage",
        url,
    )
