"""Image-caption pairs from a folder and a JSON file: the map-style dataset behind `cc_sbu_align`."""

import json
from itertools import islice
from pathlib import Path, PurePath

from torch.utils.data import Dataset

from minigpt4.datasets.datasets.base_dataset import BaseDataset, SkipSample
from minigpt4.datasets.datasets.dataloader_utils import EndlessSampler
from minigpt4.processors import ImageError, load_rgb

IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg", ".webp")


def read_annotations(path):
    """Return the list of {"image_id": str, "caption": str, ...} in {"annotations": [...]}; "instruction" may be there.

    Raises ValueError that names the file and, from 0, the record in which something is wrong.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON in UTF-8 ({error})") from error
    records = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(records, list):
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'{path}: found {found}; expected {{"annotations": [{{"image_id": ..., "caption": ...}}]}}')
    if not records:
        raise ValueError(f"{path}: 'annotations' is empty; expected at least one record")
    return [_checked(record, f"{path}: record {number}") for number, record in enumerate(records)]


def _checked(record, where):
    if not isinstance(record, dict):
        raise ValueError(f"{where} is {record!r}; expected a mapping with image_id and caption")
    for key, kinds, expected in (("image_id", (str, int), "text or a number"), ("caption", str, "text")):
        value = record.get(key)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{where}: '{key}' is {value!r}; expected {expected}")
    if not isinstance(record.get("instruction", ""), str):
        raise ValueError(f"{where}: 'instruction' is {record['instruction']!r}; expected text")
    image_id = str(record["image_id"])
    path = PurePath(image_id)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{where}: image_id '{image_id}' leads out of the image folder; expected a file's stem")
    return record | {"image_id": image_id}


class MapDataset(BaseDataset, Dataset):
    """A dataset over the list `annotation`; a subclass makes samples of its records in `_load`.

    An index may also be a pair (epoch, i); the epoch only seeds the augmentation. Where record i cannot be used it is
    counted and the next usable one is returned.
    """

    def __init__(self, annotation, vis_processor, text_processor=None, name="dataset"):
        self.annotation = annotation
        super().__init__(vis_processor, text_processor, name)

    def __len__(self):
        return len(self.annotation)

    def __getitem__(self, index):
        epoch, index = index if isinstance(index, tuple) else (0, index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: index {index} of {len(self)} records")
        for step in range(len(self)):
            if sample := self._usable(self.annotation[(index + step) % len(self)], epoch):
                return sample
        raise self.skips.nothing_usable()

    def one_pass(self):
        """Yield each usable sample once, in the order of training's first epoch on one process; count the others."""
        for _, index in islice(EndlessSampler(len(self), self.place), len(self)):
            if sample := self._usable(self.annotation[index], epoch=0):
                yield sample

    def _usable(self, record, epoch):
        """Return the sample of a record, or None where it is skipped and counted."""
        try:
            sample = self._load(record, epoch)
        except SkipSample as skipped:
            self.skips.skip(skipped.reason, self._label(record), skipped.detail)
            return None
        self.skips.usable()
        return sample

    def _load(self, record, epoch):
        """Return the sample of a record. Raises SkipSample if it cannot be used."""
        raise NotImplementedError(f"{type(self).__name__}._load")

    def _label(self, record):
        """Return what messages call a record."""
        raise NotImplementedError(f"{type(self).__name__}._label")


class CaptionDataset(MapDataset):
    """`dataset[i]` -> {"image", "text_input", "image_id", "sample_id"} of record i.

    Where any record has an instruction of its own, what the user says in place of a prompt that the model draws, all
    samples have "instruction", '' if none.

    `image_id` numbers the distinct images in the order of the records.
    """

    guide = "dataset/README_2_STAGE.md"

    def __init__(self, vis_processor, text_processor=None, vis_root="", ann_paths=(), name="caption_dataset"):
        self.vis_root = Path(vis_root)
        annotation = [record for path in ann_paths for record in read_annotations(path)]
        self.img_ids = {}
        for record in annotation:
            self.img_ids.setdefault(record["image_id"], len(self.img_ids))
        self._has_instructions = any("instruction" in record for record in annotation)
        super().__init__(annotation, vis_processor, text_processor, name)

    def _load(self, record, epoch):
        image_id = record["image_id"]
        try:
            image = load_rgb(self._image_path(image_id))
        except (ImageError, OSError) as error:
            raise SkipSample("bad_image", str(error)) from error
        number = self.img_ids[image_id]
        sample = self.prepare(image, record["caption"], epoch, image_id)
        sample |= {"image_id": number, "sample_id": image_id}
        return sample | ({"instruction": record.get("instruction", "")} if self._has_instructions else {})

    def _label(self, record):
        return record["image_id"]

    def _image_path(self, image_id):
        for suffix in IMAGE_SUFFIXES:
            path = (self.vis_root / f"{image_id}{suffix}").resolve()
            if path.is_file():
                if not path.is_relative_to(self.vis_root.resolve()):
                    raise SkipSample("bad_image", f"{path} lies outside {self.vis_root}")
                return path
        raise SkipSample("missing_file", f"no {image_id}.jpg in {self.vis_root}")
