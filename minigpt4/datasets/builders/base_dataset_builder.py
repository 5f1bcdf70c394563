"""The base class of dataset builders: the keys of a section, its processors, and its splits."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from minigpt4.common.config import REQUIRED, Problem, as_section
from minigpt4.common.registry import registry
from minigpt4.datasets.datasets.base_dataset import BaseDataset
from minigpt4.datasets.datasets.map_style import adapted
from minigpt4.processors import BaseProcessor, Blip2ImageEvalProcessor
from minigpt4.processors.blip_processors import BlipCaptionProcessor, BlipImageProcessor

SPLITS = ("train", "eval")
_WRONG_KIND = {  # key of a section -> class of the processors for the other key, and what they process
    "vis_processor": (BlipCaptionProcessor, "texts"),
    "text_processor": (BlipImageProcessor, "images"),
}


@dataclass
class BuildInfo:
    storage: Any = REQUIRED  # shards: a pattern or a list of patterns; cc_sbu_align: a folder

    READ_PATHS = ("storage",)


@dataclass
class SplitProcessors:
    """The processor of each split: a mapping with its registered `name` and its own keys."""

    train: dict[str, Any] | None = None
    eval: dict[str, Any] | None = None


@dataclass
class DatasetConfig:
    builder: str | None = None  # registered name of the builder; by default the section's own name
    type: str = "default"  # key of the YAML file in DATASET_CONFIG_DICT that has the defaults
    data_type: str = "images"  # in the files of 2023; unused
    build_info: BuildInfo = field(default_factory=BuildInfo)
    val: BuildInfo | None = None  # a validation split from separate files
    val_fraction: float | None = None  # or from this share of the training images
    vis_processor: SplitProcessors = field(default_factory=SplitProcessors)
    text_processor: SplitProcessors = field(default_factory=SplitProcessors)
    sample_ratio: float | None = None  # share of the batches, relative to the other datasets
    batch_size: int | None = None  # by default run.batch_size_train


class BaseDatasetBuilder:
    """Builds the splits of one section `datasets.<name>`: `build_datasets()`.

    A subclass has `build_train_dataset`, a dataclass `Config` if it has keys of its own, and `check_data` for what
    can be checked before training, also by --dry-run.
    """

    Config = DatasetConfig
    DATASET_CONFIG_DICT: dict[str, str] = {}  # type -> YAML file inside the package
    EXPECTED = ""  # for messages, e.g. "the path of a folder"; if set, `storage` must be a text
    name: str | None = None  # the registered name

    def __init__(self, cfg: Mapping, name: str | None = None):
        """`cfg`: the section, from a Config or any mapping; `name`: that of section and dataset, default the builder's."""
        self.name = name or self.name
        self.config = as_section(cfg, self.Config, f"datasets.{self.name}")
        self.vis_processors, self.text_processors = {}, {}

    def build_datasets(self) -> dict[str, BaseDataset]:
        """Return {"train": dataset}, and "val" if the section asks for it. Raises ValueError or OSError."""
        self.build_processors()
        train = self._adapted(self.build_train_dataset(self.config["build_info"].get("storage")))
        if self.config.get("sample_ratio") is not None:  # else a dataset's own one is kept
            train.sample_ratio = self.config["sample_ratio"]
        train.batch_size = self.config.get("batch_size")
        splits, fraction = {"train": train}, self.config.get("val_fraction")
        if self.config.get("val") or fraction:
            splits["val"] = self.build_val_dataset()
            splits["val"].set_split(True, fraction)
        if fraction:
            train.set_split(False, fraction)
        for split, dataset in splits.items():
            if fraction and hasattr(dataset, "__len__") and not len(dataset):
                expected = "change it, or name files of its own by val"
                raise ValueError(
                    f"datasets.{self.name}.val_fraction: {fraction} leaves nothing for {split}; {expected}"
                )
        return splits

    def build_train_dataset(self, storage: Any) -> BaseDataset:
        """Return the dataset stored at `storage`, with the processors of "train"."""
        raise NotImplementedError(f"{type(self).__name__}.build_train_dataset")

    def build_val_dataset(self) -> BaseDataset:
        """Return the dataset of the section's `val`, by default of the training data, with the "eval" processors."""
        builder = copy.copy(self)
        builder.name = f"{self.name} val"
        builder.config = {
            **self.config,
            "build_info": _val_info(self.config) or self.config["build_info"],
        }
        builder.vis_processors = {"train": self.vis_processors["eval"]}
        builder.text_processors = {"train": self.text_processors["eval"]}
        return builder._adapted(
            builder.build_train_dataset(builder.config["build_info"].get("storage"))
        )

    def _adapted(self, dataset: Any) -> BaseDataset:
        return adapted(dataset, self.name, self.vis_processors["train"])

    def build_processors(self) -> None:
        """Fill `vis_processors` and `text_processors`, both {split: processor}, from the section."""
        where = f"datasets.{self.name}"
        self.vis_processors, self.text_processors = _processors(self.config, where)

    @classmethod
    def preflight(cls, cfg: Mapping, where: str) -> list[Problem]:
        """Return the problems of the section at the key `where`; reads as little of the data as possible."""
        problems = cls.data_problems(cfg["build_info"], f"{where}.build_info")
        if cfg.get("val"):
            problems += cls.data_problems(_val_info(cfg), f"{where}.val")
        try:
            _processors(cfg, where)
        except ValueError as error:
            problems.append(Problem.parse(error, where))
        for key, kind in (("sample_ratio", "a number"), ("batch_size", "an integer")):
            if cfg.get(key) is not None and not cfg[key] > 0:
                problems.append(Problem(f"{where}.{key}", f"{cfg[key]}; expected {kind} above 0"))
        fraction = cfg.get("val_fraction")
        if fraction is not None and not 0 < fraction < 1:
            problems.append(
                Problem(f"{where}.val_fraction", f"{fraction}; expected a number between 0 and 1")
            )
        if fraction is not None and cfg.get("val"):
            problems.append(
                Problem(
                    f"{where}.val_fraction",
                    f"{fraction}, and {where}.val is there; give one of them",
                )
            )
        return problems

    @classmethod
    def data_problems(cls, info: Mapping, where: str) -> list[Problem]:
        """Return the problems of the data that `info`, the mapping at the key `where`, refers to."""
        storage, key = info["storage"], f"{where}.storage"
        if cls.EXPECTED and not (isinstance(storage, str) and storage.strip()):
            return [Problem(key, f"{storage!r}; expected {cls.EXPECTED}")]
        try:
            cls.check_data(info)
        except FileNotFoundError as error:
            expected = f"; expected {cls.EXPECTED}" if cls.EXPECTED else ""
            return [Problem(key, f"nothing at '{error.filename}'{expected}")]
        except OSError as error:
            return [Problem(key, str(error))]
        except ValueError as error:
            return [Problem(key, str(message)) for message in error.args]
        return []

    @classmethod
    def check_data(cls, info: Mapping) -> None:
        """Raise OSError, or ValueError with one or more messages, if the data is missing or cannot be used."""


def _val_info(cfg: Mapping) -> dict | None:
    """Return `val`, with keys that it leaves out, such as the image folder, taken from `build_info`; None without it."""
    val = cfg.get("val")
    if not val:
        return None
    given = {key: value for key, value in val.items() if value is not None}
    return {**cfg["build_info"], **given}


def _processors(cfg: Mapping, where: str) -> tuple[dict, dict]:
    """Return ({split: image processor}, {split: caption processor}). Raises ValueError that names the key.

    If the section asks for a validation split but has no "eval" processors, images are resized to a square of
    training's size, with its mean and std, and captions are processed as in training.
    """
    vis = {split: _processor(cfg, "vis_processor", split, where) for split in SPLITS}
    text = {split: _processor(cfg, "text_processor", split, where) for split in SPLITS}
    train, key = vis["train"], f"{where}.vis_processor"
    if train is None:
        example = "name an image processor, e.g. {name: blip2_image_train, image_size: 224}"
        raise ValueError(f"{key}.train: missing; {example}")
    if cfg.get("val") or cfg.get("val_fraction"):
        text["eval"] = text["eval"] or text["train"]
        if vis["eval"] is None:
            if not isinstance(train, BlipImageProcessor):
                raise ValueError(
                    f"{key}.eval: missing; val needs it where train is a {type(train).__name__}"
                )
            vis["eval"] = Blip2ImageEvalProcessor(train.image_size, train.mean, train.std)
    unchanged = BaseProcessor()
    return vis, {"train": text["train"] or unchanged, "eval": text["eval"] or unchanged}


def _processor(cfg: Mapping, role: str, split: str, where: str) -> Any:
    section = (cfg.get(role) or {}).get(split)
    if not section:
        return None
    cls = registry.get_processor_class(section["name"])
    wrong_class, kind = _WRONG_KIND[role]
    if issubclass(cls, wrong_class):
        raise ValueError(
            f"{where}.{role}.{split}.name: '{section['name']}' is a processor of {kind}"
        )
    try:
        return cls.from_config(section)
    except ValueError as error:
        raise ValueError(f"{where}.{role}.{split}: {error}") from error
