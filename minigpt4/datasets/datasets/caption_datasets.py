"""`cc_sbu_align`: images in a folder, their captions in one JSON file. Source: MiniGPT-4 2023."""

from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from minigpt4.common.image_files import IMAGE_SUFFIXES, find_file
from minigpt4.common.utils import placeholder, printable, read_json
from minigpt4.datasets.datasets.image_text_dataset import (
    ImageTextDataset,
    check_contents,
    file_below,
)
from minigpt4.datasets.datasets.record_text import read_text
from minigpt4.datasets.datasets.skips import SkipSample
from minigpt4.processors import load_rgb


def read_annotations(path: str | Path) -> list[dict]:
    """Return the records {"image_id": str, "caption": str, optional "instruction": str, ..} under "annotations".

    Raises ValueError that names the file and the number, from 0, of a record that is malformed.
    """
    if found := placeholder(path, "annotations"):
        raise ValueError(f"{path}: {found}")
    content = read_json(path)
    records = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(records, list):
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f'{path}: found {found}; expected {{"annotations": [{{"image_id": ..., "caption": ...}}]}}'
        )
    if not records:
        raise ValueError(f"{path}: 'annotations' is empty; expected at least one record")
    return [_checked(record, f"{path}: record {number}") for number, record in enumerate(records)]


def _checked(record: Any, where: str) -> dict:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {record!r:.60}; expected a mapping with image_id and caption")
    for key, kinds, expected in (
        ("image_id", (str, int), "text or a number"),
        ("caption", str, "text"),
    ):
        value = record.get(key)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{where}: '{key}' is {value!r:.60}; expected {expected}")
    if not isinstance(record.get("instruction"), (str, type(None))):
        raise ValueError(f"{where}: 'instruction' is {record['instruction']!r:.60}; expected text")
    image_id = str(record["image_id"])
    path = PurePath(image_id)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        shown = printable(image_id, 60)
        raise ValueError(
            f"{where}: image_id '{shown}' leads out of the image folder; expected a file's stem"
        )
    return record | {"image_id": image_id}


def image_file(folder: Path, image_id: str) -> str | None:
    """Return the path, relative to `folder`, of the image `image_id` with any image suffix; None if there is none."""
    for suffix in IMAGE_SUFFIXES:
        if name := find_file(folder, image_id + suffix):
            return name
    return None


def check_images(records: Sequence[dict], folder: Path, most: int = 100) -> None:
    """Check about `most` images, evenly spaced over the records. Raises ValueError if none is there and readable."""
    chosen = records[:: max(1, len(records) // most)]
    names = [image_file(folder, record["image_id"]) for record in chosen]
    if not any(names):
        first = printable(chosen[0]["image_id"])
        raise ValueError(
            f"'{folder}' has no {first}.jpg, nor any other of {len(chosen)} that were looked for"
        )
    check_contents([folder / name for name in names if name])


class CaptionDataset(ImageTextDataset):
    """`dataset[i]` -> {"image", "text_input", "image_id", "sample_id"} of record i of `read_annotations`.

    A sample's "image_id" is the index of its image among the distinct images, in the order of the records. A record
    with an instruction of its own gives "turns".
    """

    guide = "dataset/README_2_STAGE.md"
    load_image = staticmethod(load_rgb)

    def __init__(
        self,
        vis_processor: Any,
        text_processor: Any = None,
        vis_root: str | Path = "",
        ann_paths: Sequence[str | Path] = (),
        name: str = "caption_dataset",
    ):
        annotation, self.img_ids = [], {}
        for path in ann_paths:
            annotation += read_annotations(path)
        for record in annotation:
            self.img_ids.setdefault(record["image_id"], len(self.img_ids))
        super().__init__(annotation, vis_root, vis_processor, text_processor, name)

    def load(self, record: dict, epoch: int) -> dict:
        image_id = record["image_id"]
        sample = self.sample(self._image_path(image_id), read_text(record), epoch, image_id)
        return sample | {"image_id": self.img_ids[image_id]}

    def label_of(self, record: dict) -> str:
        return record["image_id"]

    image_of = label_of

    def _image_path(self, image_id: str) -> Path:
        if name := image_file(self.vis_root, image_id):
            return file_below(self.vis_root, name)
        raise SkipSample("missing_file", f"no {image_id}.jpg in {self.vis_root}")
