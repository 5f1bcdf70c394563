"""The layouts of `build_info` of instruction datasets, as in the YAML files of MiniGPT-v2, and the files they refer to.

Each layout is a dataclass of keys, and a function from such a section to its Files.
"""

from collections.abc import Mapping, Sequence
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
    dataset: str = REQUIRED  # folder below ann_path; a prefix "inv" is removed
    splitBy: str = REQUIRED  # in the name of refs(<splitBy>).p


@dataclass
class GenomeInfo:
    data_dir: str = REQUIRED

    READ_PATHS = ("data_dir",)


@dataclass
class AnnotationFiles:
    storage: Any = REQUIRED  # path, or a list of paths
    url: Any = None  # from where the release downloads them; used only in messages
    md5: Any = None  # of the release's download; unused

    READ_PATHS = ("storage",)


@dataclass
class Annotations:
    train: AnnotationFiles = field(default_factory=AnnotationFiles)


@dataclass
class Images:
    storage: str = REQUIRED  # the folder of the images, or its parent if the images are in train/

    READ_PATHS = ("storage",)


@dataclass
class SplitsInfo:
    annotations: Annotations = field(default_factory=Annotations)
    images: Images = field(default_factory=Images)


class Files(NamedTuple):
    """The files that `build_info` refers to."""

    annotations: list[tuple[str, Path]]  # (key, annotation file)
    folders: list[Path] = []  # where to search for images, in this order
    folders_key: str = ""
    url: str = ""  # of the annotation files


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
    """Images are searched in both places: the release's code has them in train/, its guide in the folder above."""
    train, images = info["annotations"]["train"], expand_path(info["images"]["storage"])
    paths, urls = train["storage"], train.get("url") or ""
    paths = [paths] if isinstance(paths, str) else paths
    is_list = isinstance(paths, Sequence) and len(paths) > 0
    if not is_list or not all(isinstance(path, str) and path.strip() for path in paths):
        expected = "expected the path of an annotation file, or a list of such paths"
        raise ValueError(f"annotations.train.storage: {paths!r}; {expected}")
    return Files(
        [("annotations.train.storage", expand_path(path)) for path in paths],
        [images / "train", images],
        "images.storage",
        urls if isinstance(urls, str) else ", ".join(urls),
    )
