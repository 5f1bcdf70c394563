"""Own images with captions or conversations, from a folder or an annotation file."""

import logging
import os
from pathlib import Path

from minigpt4.datasets.datasets.annotations import Fault, Record, outside, read_records
from minigpt4.datasets.datasets.base_dataset import DataError, SkipSample
from minigpt4.datasets.datasets.caption_datasets import IMAGE_SUFFIXES, MapDataset
from minigpt4.processors import ImageError, load_rgb

# Captions of a whole folder; the second name is that of Hugging Face's "imagefolder".
CAPTION_FILES = tuple(f"{stem}.{kind}" for stem in ("captions", "metadata") for kind in ("jsonl", "json", "csv", "tsv"))


def read_folder(folder):
    """Return the Records and Faults of a folder and those below it: the captions file's, then images with a .txt.

    Raises OSError, or ValueError where there is no image, no caption, or more than one captions file.
    """
    folder = Path(folder)
    captions = [name for name in CAPTION_FILES if (folder / name).is_file()]
    if len(captions) > 1:
        raise ValueError(f"'{folder}' has {' and '.join(captions)}; keep one of them")
    records = read_records(folder / captions[0], folder) if captions else []
    named = {record.image for record in records if isinstance(record, Record)}
    files = {
        os.path.relpath(os.path.join(place, name), folder) for place, _, names in os.walk(folder) for name in names
    }
    pictures = [f for f in sorted(files) if f.lower().endswith(IMAGE_SUFFIXES) and os.path.basename(f)[0] != "."]
    if not pictures:
        raise ValueError(f"'{folder}' has no image; expected {', '.join(IMAGE_SUFFIXES)} files")
    others = [picture for picture in pictures if picture not in named]
    with_text = [picture for picture in others if _text_file(picture) in files]
    records += [Record(picture, picture, None) for picture in with_text]
    if not records:
        raise ValueError(
            f"'{folder}' has no caption for its {len(pictures)} images; expected a .txt file beside each (first: "
            f'{_text_file(pictures[0])}), or captions.jsonl with {{"image": path, "caption": text}} a line'
        )
    without = sorted(set(others) - set(with_text))
    if captions:  # it says which images belong
        logging.info("%s: %d images are not in %s and have no .txt file", folder, len(without), captions[0])
        return records
    return records + [Fault(name, "no_caption", f"no {_text_file(name)} beside it") for name in without]


def _text_file(picture):
    return os.path.splitext(picture)[0] + ".txt"


def check_pictures(records, folder, most=100):
    """Raise ValueError if one of some `most` images, evenly chosen, leads out of `folder`, or if all are missing."""
    records = [record for record in records if isinstance(record, Record)]
    chosen = records[:: max(1, len(records) // most)]
    missing = [record for record in chosen if not _inside(folder, record.image, record.where).is_file()]
    if len(missing) == len(chosen):
        raise ValueError(
            f"{missing[0].where}: no file '{missing[0].image}' in the image folder '{folder}', nor any other of "
            f"{len(chosen)} that were looked for; name the folder that the paths start from (build_info.images)"
        )


def _inside(folder, name, where):
    """Return the path of a file below `folder`. Raises DataError where a link leads out of it."""
    path, root = (Path(folder) / name).resolve(), Path(folder).resolve()
    if not path.is_relative_to(root):
        raise DataError(str(outside(where, name, root)))
    return path


class ImageTextDataset(MapDataset):
    """`dataset[i]` -> {"image", "text_input", "sample_id"} of record i, and "turns" where it has a conversation.

    `records` are Records and Faults; the Faults are counted when they are met.
    """

    guide = "docs/custom_data.md"

    def __init__(self, records, vis_root, vis_processor, text_processor=None, name="own"):
        self.vis_root = Path(vis_root)
        super().__init__(records, vis_processor, text_processor, name)
        faults = [record for record in records if isinstance(record, Fault)]
        if faults:
            logging.warning(
                f"{name}: {len(faults)} of {len(records)} records cannot be used; first: {faults[0].where}: "
                f"{faults[0].reason} ({faults[0].detail})"
            )

    def _load(self, record, epoch):
        if isinstance(record, Fault):
            raise SkipSample(record.reason, record.detail)
        path = _inside(self.vis_root, record.image, record.where)
        text = self._text_beside(record) if record.text is None else record.text
        try:
            image = load_rgb(path)
        except FileNotFoundError as error:
            raise SkipSample("missing_file", f"no {record.image} in {self.vis_root}") from error
        except (ImageError, OSError) as error:
            raise SkipSample("bad_image", str(error)) from error
        return self.prepare(image, text, epoch, record.where) | {"sample_id": record.where}

    def _text_beside(self, record):
        name = _text_file(record.image)
        try:
            caption = _inside(self.vis_root, name, record.where).read_text(encoding="utf-8-sig").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SkipSample("bad_caption", f"{name}: {error}") from error
        if not caption:
            raise SkipSample("bad_caption", f"{name} is empty")
        return caption

    def _label(self, record):
        return record.where
