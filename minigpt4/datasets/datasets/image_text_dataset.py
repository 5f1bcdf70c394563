"""Images with captions or conversations, record by record: own data, and the base of `cc_sbu_align`."""

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from minigpt4.common.image_files import IMAGE_SUFFIXES, find_file, leads_out, list_files, same_file
from minigpt4.common.utils import placeholder, printable
from minigpt4.datasets.datasets.annotations import Fault, Record, outside, read_records, text_file
from minigpt4.datasets.datasets.base_dataset import BaseDataset
from minigpt4.datasets.datasets.dataloader_utils import EndlessSampler
from minigpt4.datasets.datasets.record_text import read_text
from minigpt4.datasets.datasets.skips import SkipSample
from minigpt4.processors import ImageError

# Names of a captions file for a whole folder; Hugging Face's "imagefolder" calls it metadata.
CAPTION_FILES = tuple(f"captions.{kind}" for kind in ("jsonl", "json", "csv", "tsv"))
CAPTION_FILES += tuple(name.replace("captions", "metadata") for name in CAPTION_FILES)


def read_folder(folder: str | Path) -> list[Record | Fault]:
    """Return the records of a folder and its subfolders: those of its captions file, then images with a .txt.

    Raises OSError, or ValueError if there is no image, no caption, or more than one captions file.
    """
    folder = Path(folder)
    captions_files = [name for name in CAPTION_FILES if (folder / name).is_file()]
    if len(captions_files) > 1:
        raise ValueError(f"'{folder}' has {' and '.join(captions_files)}; keep one of them")
    records = read_records(folder / captions_files[0], folder) if captions_files else []
    # Images that the captions file does not list may have a .txt file of the same name beside them.
    listed = {same_file(record.image) for record in records if isinstance(record, Record)}
    files = list_files(folder, (*IMAGE_SUFFIXES, ".txt"))
    images = [name for name in files if not name.lower().endswith(".txt")]
    texts = {same_file(name) for name in files if name.lower().endswith(".txt")}
    if not images:
        raise ValueError(f"'{folder}' has no image; expected {', '.join(IMAGE_SUFFIXES)} files")
    without_text = []
    for image in images:
        name = same_file(image)
        if name in listed:
            continue
        if text_file(name) in texts:
            records.append(Record(image, image, None))
        else:
            without_text.append(image)
    if not records:
        raise ValueError(
            f"'{folder}' has no caption for its {len(images)} images; expected a .txt file beside each (first: "
            f'{text_file(images[0])}), or captions.jsonl with {{"image": path, "caption": text}} a line'
        )
    # A captions file may leave images out on purpose; without one, an image without text is a fault.
    if captions_files:
        message = "%s: %d images are not in %s and have no .txt file"
        logging.info(message, folder, len(without_text), captions_files[0])
        return records
    return records + [
        Fault(name, "no_caption", f"no {text_file(name)} beside it") for name in without_text
    ]


def check_images(records: Sequence[Record | Fault], folder: Path, most: int = 100) -> None:
    """Check about `most` images, evenly spaced over the records.

    Raises ValueError if one of them is a link out of `folder`, or if none is an image file that can be read.
    """
    num_read = len(records)
    records = [record for record in records if isinstance(record, Record)]
    if not records:
        raise ValueError(
            f"none of {num_read} records can be used; expected images with texts in '{folder}'"
        )
    chosen = records[:: max(1, len(records) // most)]
    names = [find_file(folder, record.image) for record in chosen]
    for record, name in zip(chosen, names, strict=True):
        if name is not None and leads_out(folder, name):
            raise outside(record.where, record.image, folder)
    if not any(names):
        raise ValueError(
            f"{chosen[0].where}: no file '{printable(chosen[0].image)}' in the image folder '{folder}', nor any other "
            f"of {len(chosen)} that were looked for; name the folder that the paths start from (build_info.images)"
        )
    check_contents([folder / name for name in names if name])


def check_contents(images: Sequence[Path]) -> None:
    """Raise ValueError if each of these files is a Git LFS pointer, a web page, empty or unreadable."""
    faults = []
    for image in images:
        try:
            faults.append(placeholder(image, "an image"))
        except OSError as error:
            faults.append(f"cannot be read ({error.strerror})")
    if all(faults):
        raise ValueError(
            f"'{images[0]}' {faults[0]} ({len(faults)} such images of {len(faults)} that were looked at)"
        )


def file_below(folder: Path, name: str) -> Path:
    """Return the path of the file `name` below `folder` (see `find_file`). Raises SkipSample if it cannot be used."""
    found = find_file(folder, name)
    if found is None:
        raise SkipSample("missing_file", f"no {name} in {folder}")
    if leads_out(folder, found):
        raise SkipSample("bad_image", f"{name} is a link out of {folder}")
    return folder / found


class ImageTextDataset(BaseDataset, Dataset):
    """`dataset[i]` -> {"image", "text_input", "sample_id"} of record i, and "turns" if it has a conversation.

    `annotation` contains Records and Faults; a Fault is counted when it is read. The epoch of a SampleIndex affects
    only the augmentation seed. If record i cannot be used, it is counted, and the next usable one is returned, or
    None in validation.
    """

    guide = "docs/custom_data.md"

    def __init__(
        self,
        annotation: list,
        vis_root: str | Path,
        vis_processor: Any,
        text_processor: Any = None,
        name: str = "own",
    ):
        super().__init__(vis_processor, text_processor, Path(vis_root), name=name)
        self.annotation = annotation
        faults = [record for record in annotation if isinstance(record, Fault)]
        if faults:
            logging.warning(
                f"{name}: {len(faults)} of {len(annotation)} records cannot be used; first: "
                f"{printable(faults[0].where)}: {faults[0].reason} ({printable(faults[0].detail)})"
            )

    def set_split(self, is_val: bool, val_fraction: float | None = None) -> None:
        super().set_split(is_val, val_fraction)
        if val_fraction is not None:
            self.annotation = [
                record for record in self.annotation if self.holds(self.image_of(record))
            ]

    def __len__(self) -> int:
        return len(self.annotation)

    def __getitem__(self, index: int) -> dict | None:
        epoch = getattr(index, "epoch", 0)
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.name}: index {index} of {len(self)} records")
        if self.is_val:
            return self.usable(self.annotation[index], epoch)
        for step in range(len(self)):
            if sample := self.usable(self.annotation[(index + step) % len(self)], epoch):
                return sample
        raise self.skips.nothing_usable()

    def one_pass(self) -> Iterator[dict]:
        """Yield each usable sample once, in the order of training's first epoch on one process; count the rest."""
        for index in islice(EndlessSampler(len(self), self.place), len(self)):
            if sample := self.usable(self.annotation[index], epoch=0):
                yield sample

    def load(self, record: Any, epoch: int) -> dict:
        if isinstance(record, Fault):
            raise SkipSample(record.reason, record.detail)
        path = file_below(self.vis_root, record.image)
        text = record.text if isinstance(record.text, (str, tuple)) else self._text_beside(record)
        return self.sample(path, text, epoch, record.where)

    def label_of(self, record: Any) -> str:
        return record.where

    def image_of(self, record: Any) -> str:
        """Return the identity of a record's image, by which it is split: all records of one image are in one split."""
        return record.where if isinstance(record, Fault) else same_file(record.image)

    def sample(self, path: Path, text: Any, epoch: int, label: str) -> dict:
        """Return the sample of an image file and its text. Raises SkipSample."""
        try:
            pixels = self.load_image(path)
        except (ImageError, OSError) as error:
            raise SkipSample("bad_image", str(error)) from error
        return self.prepare(pixels, text, epoch, label) | {"sample_id": printable(label, 1000)}

    def _text_beside(self, record: Record) -> str | tuple:
        name = text_file(record.image)
        try:
            content = file_below(self.vis_root, name).read_bytes()
        except OSError as error:
            raise SkipSample("bad_caption", f"{name}: {error}") from error
        return read_text({**(record.text or {}), "txt": content})
