"""Builders for the 22 instruction datasets of MiniGPT-v2: SOURCES defines each by its files, their format and its Task.

`build_info` has the keys of the release's YAML files; docs/instruction_data.md says which official files belong there.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from minigpt4.common.config import Problem
from minigpt4.common.config_paths import find_path
from minigpt4.common.registry import registry
from minigpt4.common.utils import printable
from minigpt4.datasets.builders import instruction_files as layouts
from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder, DatasetConfig
from minigpt4.datasets.datasets.image_text_dataset import check_contents
from minigpt4.datasets.datasets.skips import SkipSample
from minigpt4.datasets.instructions import dialogues, readers
from minigpt4.datasets.instructions.dataset import InstructionDataset, Task, find_image
from minigpt4.datasets.instructions.pools import SLOT, pool_path, read_pool
from minigpt4.datasets.instructions.records import GUIDE, Example, Format, Records, read_rows
from minigpt4.datasets.instructions.regions import read_genome, read_refs
from minigpt4.processors import Blip2ImageEvalProcessor, Blip2ImageTrainProcessor


class Source(NamedTuple):
    """The definition of one dataset."""

    yaml: str  # below configs/datasets, without suffix
    info: type  # the dataclass of `build_info`
    files: Callable[[Mapping], layouts.Files]  # from `build_info`
    read: Callable[[Sequence[Path]], Records]  # from the annotation files
    task: Task
    leaves_out_missing: bool = False  # records whose images do not exist are removed before the run


def _rows(form: Format) -> Callable[[Sequence[Path]], Records]:
    return partial(read_rows, form)


_PLAIN = (layouts.FilesInfo, layouts.plain_files)
_TEXT_ONLY = (layouts.TextInfo, layouts.text_files)
_SPLIT = (layouts.SplitsInfo, layouts.split_files)
_REFS = (layouts.RefsInfo, layouts.ref_files, read_refs)
_CAPTION = Task("[caption]", "caption", takes_words=False, cleans_answer=True)
_VQA = Task("[vqa]", "vqa", cleans_question=True, cleans_answer=True)
_REFER = Task("[refer]", "refer", cleans_question=True)
_IDENTIFY = Task("[identify]", "identify", cleans_answer=True, is_inverse=True)
_GROUNDING = Task("[grounding]", "grounding", takes_words=False)
_DETECTION = Task("[detection]")
_FIRST_TURN = Task(cleans_question=True)
_DIALOGUE = Task(is_dialogue=True)
_TEXT = Task(cleans_question=True, cleans_answer=True)

SOURCES = {
    "coco_caption": Source("coco/caption", *_SPLIT, _rows(readers.COCO_CAPTIONS), _CAPTION),
    "textcaps_caption": Source("textcaps/caption", *_PLAIN, _rows(readers.TEXTCAPS), _CAPTION),
    "coco_vqa": Source(
        "coco/defaults_vqa", *_SPLIT, _rows(readers.VQA), _VQA, leaves_out_missing=True
    ),
    "ok_vqa": Source("okvqa/defaults", *_SPLIT, _rows(readers.VQA), _VQA, leaves_out_missing=True),
    "aok_vqa": Source(
        "aokvqa/defaults", *_SPLIT, _rows(readers.AOK_VQA), _VQA, leaves_out_missing=True
    ),
    "gqa": Source("gqa/balanced_val", *_SPLIT, _rows(readers.GQA), _VQA),
    "ocrvqa": Source("ocrvqa/ocrvqa", *_PLAIN, _rows(readers.OCR_VQA), _VQA),
    "refcoco": Source("coco_bbox/refcoco", *_REFS, _REFER),
    "refcocop": Source("coco_bbox/refcocop", *_REFS, _REFER),
    "refcocog": Source("coco_bbox/refcocog", *_REFS, _REFER),
    "invrefcoco": Source("coco_bbox/invrefcoco", *_REFS, _IDENTIFY),
    "invrefcocop": Source("coco_bbox/invrefcocop", *_REFS, _IDENTIFY),
    "invrefcocog": Source("coco_bbox/invrefcocog", *_REFS, _IDENTIFY),
    "refvg": Source("vg/ref", layouts.GenomeInfo, layouts.genome_files, read_genome, _REFER),
    "flickr_grounded_caption": Source(
        "flickr/default", *_PLAIN, _rows(readers.GROUNDED_CAPTION), _GROUNDING
    ),
    "flickr_CaptionToPhrase": Source(
        "flickr/caption_to_phrase", *_PLAIN, _rows(readers.CAPTION_PHRASES), _DETECTION
    ),
    "flickr_ObjectToPhrase": Source(
        "flickr/object_to_phrase", *_PLAIN, _rows(readers.PHRASE_BOXES), _DETECTION
    ),
    "llava_detail": Source("llava/detail", *_PLAIN, _rows(dialogues.FIRST_TURN), _FIRST_TURN),
    "llava_reason": Source("llava/reason", *_PLAIN, _rows(dialogues.FIRST_TURN), _FIRST_TURN),
    "llava_conversation": Source(
        "llava/conversation", *_PLAIN, _rows(dialogues.ALL_TURNS), _DIALOGUE
    ),
    "multitask_conversation": Source(
        "multitask_conversation/default", *_PLAIN, _rows(dialogues.ALL_TURNS), _DIALOGUE
    ),
    "unnatural_instruction": Source(
        "nlp/unnatural_instruction", *_TEXT_ONLY, _rows(readers.TEXT_ALONE), _TEXT
    ),
}


@dataclass
class InstructionConfig(DatasetConfig):
    # file of instruction templates, one per line; by default one in prompts/
    instructions: str | None = None
    # True: coordinates of boxes that extend beyond the image are not in 0..100, as in the release
    exact_boxes: bool = False

    READ_PATHS = ("instructions",)


class InstructionBuilder(BaseDatasetBuilder):
    """Builds the dataset that SOURCE defines. Files that several datasets use are read once.

    Images are resized without cropping, also by `blip2_image_train`, as in the release: a crop would make boxes wrong.
    """

    SOURCE: Source

    def build_train_dataset(self, storage: Any) -> InstructionDataset:
        records, files = self.records(self.config["build_info"])
        task = self.SOURCE.task
        if self.SOURCE.leaves_out_missing:
            records = _with_images(records, files.folders, self.name)
        pool_file = _pool_file(self.config, task)
        pool = read_pool(pool_file, task.takes_words) if pool_file else [SLOT]
        vis, text = self.vis_processors["train"], self.text_processors["train"]
        is_exact = self.config["exact_boxes"]
        return InstructionDataset(
            records, task, files.folders, vis, text, self.name, pool, is_exact
        )

    def build_processors(self) -> None:
        super().build_processors()
        for split, processor in self.vis_processors.items():
            if isinstance(processor, Blip2ImageTrainProcessor):
                self.vis_processors[split] = Blip2ImageEvalProcessor(
                    processor.image_size, processor.mean, processor.std
                )

    @classmethod
    def records(cls, info: Mapping) -> tuple[Records, layouts.Files]:
        """Return (records, files) for a section's `build_info` or `val`. Raises OSError or ValueError."""
        files = cls.SOURCE.files(info)
        stamps = [
            (path, path.stat().st_mtime_ns, path.stat().st_size) for _, path in files.annotations
        ]
        return _read_once(cls.SOURCE.read, tuple(stamps)), files

    @classmethod
    def preflight(cls, cfg: Mapping, where: str) -> list[Problem]:
        problems = super().preflight(cfg, where)
        task, key = cls.SOURCE.task, f"{where}.instructions"
        if cfg.get("instructions") and task.is_dialogue:
            problems.append(Problem(key, "a conversation has its own questions; remove the key"))
        elif path := _pool_file(cfg, task):
            try:
                read_pool(path, task.takes_words)
            except FileNotFoundError:
                problems.append(
                    Problem(key, f"no file at '{path}'; expected one instruction a line")
                )
            except (ValueError, OSError) as error:
                problems.append(Problem(key, str(error)))
        return problems

    @classmethod
    def data_problems(cls, info: Mapping, where: str) -> list[Problem]:
        try:
            files = cls.SOURCE.files(info)
        except ValueError as error:
            return [Problem.parse(f"{where}.{error}", where)]
        missing = [(key, path) for key, path in files.annotations if not path.is_file()]
        problems = [Problem(f"{where}.{key}", _no_file(path, files.url)) for key, path in missing]
        if files.folders and not any(folder.is_dir() for folder in files.folders):
            folder = files.folders[-1]
            problems.append(
                Problem(
                    f"{where}.{files.folders_key}", f"no folder at '{folder}'; expected the images"
                )
            )
        if problems:
            return problems
        try:
            records, _ = cls.records(info)
        except (ValueError, OSError) as error:
            return [Problem(f"{where}.{files.annotations[0][0]}", str(error))]
        try:
            _check_images(records, files.folders)
        except (ValueError, OSError) as error:
            return [Problem(f"{where}.{files.folders_key}", str(error))]
        return []


# cached: the configuration's check, the run, and the inverse of a dataset read the same files
@lru_cache(maxsize=64)
def _read_once(read: Callable[[Sequence[Path]], Records], stamps: tuple) -> Records:
    return read([path for path, _, _ in stamps])


def _pool_file(cfg: Mapping, task: Task) -> str | None:
    """Return the path of the instruction templates: the user's, or those shipped for the task; None if it has none."""
    if cfg["instructions"]:
        return cfg["instructions"]
    return find_path(pool_path(task.pool)) if task.pool else None


def _no_file(path: Path, url: str) -> str:
    """Return the message for an annotation file that does not exist."""
    others = [other.name for other in path.parent.glob(f"*{path.suffix}")]
    there = f" (the folder has {', '.join(sorted(others)[:5])})" if others else ""
    source = f"; the release takes it from {url}" if url else ""
    return f"no file at '{path}'{there}{source}: {GUIDE}"


def _with_images(records: Records, folders: Sequence[Path], name: str) -> Records:
    """Return the records whose images exist; a warning counts the others. Raises ValueError if none is left."""
    existing = set()
    for folder in filter(Path.is_dir, folders):
        existing |= {entry.name for entry in os.scandir(folder)}
    kept = [
        record for record in records if not isinstance(record, Example) or record.image in existing
    ]
    if not any(isinstance(record, Example) for record in kept):
        raise ValueError(
            f"datasets.{name}: none of the images of its {len(records):,} records is in {_quoted(folders)}"
        )
    if num_removed := len(records) - len(kept):
        removed = f"{num_removed:,} of {len(records):,} records"
        logging.warning(
            f"{name}: {removed} are about images that are not in {_quoted(folders)}; they are left out"
        )
    return kept


def _check_images(records: Records, folders: Sequence[Path], most: int = 100) -> None:
    """Check about `most` images, evenly spaced over the records. Raises ValueError if none is there and readable."""
    with_image = [
        record for record in records if isinstance(record, Example) and record.image is not None
    ]
    chosen, found = with_image[:: max(1, len(with_image) // most)], []
    for record in chosen:
        try:
            found.append(find_image(folders, record.image))
        except SkipSample as skipped:
            logging.debug("%s: %s", record.where, skipped.detail)
    if found:
        check_contents(found)
    elif chosen:
        first = f"'{printable(chosen[0].image)}' ({chosen[0].where})"
        raise ValueError(
            f"no {first} in {_quoted(folders)}, nor any other of {len(chosen)} that were looked for"
        )


def _quoted(folders: Sequence[Path]) -> str:
    return " or ".join(f"'{folder}'" for folder in folders)


def _register(name: str, source: Source) -> None:
    """Register a builder class for a dataset, with a Config whose `build_info` and `val` have the dataset's layout."""
    fields = [
        ("build_info", source.info, field(default_factory=source.info)),
        ("val", source.info | None, None),
    ]
    members = {
        "name": name,
        "SOURCE": source,
        "Config": make_dataclass("Config", fields, bases=(InstructionConfig,)),
        "DATASET_CONFIG_DICT": {"default": f"configs/datasets/{source.yaml}.yaml"},
    }
    registry.register_builder(name)(type(f"Builder_{name}", (InstructionBuilder,), members))


for _name, _source in SOURCES.items():
    _register(_name, _source)
