"""What the builders share: the keys of their section, and the processors that it names."""

from dataclasses import dataclass, field
from typing import Any

from minigpt4.common.config import REQUIRED
from minigpt4.common.registry import registry
from minigpt4.processors import BaseProcessor

SPLITS = ("train", "eval")


@dataclass
class BuildInfo:
    storage: Any = REQUIRED  # shards: a pattern or a list of patterns; cc_sbu_align: a folder


@dataclass
class SplitProcessors:
    """A processor a split: {name: registered name, and that processor's own keys}."""

    train: dict[str, Any] | None = None
    eval: dict[str, Any] | None = None


@dataclass
class DatasetConfig:
    builder: str | None = None  # registered name of the builder; the section's own name if absent
    type: str = "default"  # which of the builder's YAML files is overlaid
    data_type: str = "images"
    build_info: BuildInfo = field(default_factory=BuildInfo)
    vis_processor: SplitProcessors = field(default_factory=SplitProcessors)
    text_processor: SplitProcessors = field(default_factory=SplitProcessors)
    sample_ratio: float | None = None  # share of the batches, relative to the other datasets
    batch_size: int | None = None  # run.batch_size_train if absent


class BaseDatasetBuilder:
    """`build_datasets()` returns {"train": dataset} for one section `datasets.<name>`."""

    Config = DatasetConfig
    DATASET_CONFIG_DICT = {}  # type -> YAML file inside the package
    name = None  # the registered name

    def __init__(self, cfg, name=None):
        """`name` is that of the section, and then of the dataset; by default the builder's own."""
        self.config = cfg
        self.name = name or self.name
        self.vis_processors, self.text_processors = {}, {}

    def build_datasets(self):
        """Return {"train": dataset}, with its name, mixing ratio and batch size. Raises ValueError or OSError."""
        self.build_processors()
        dataset = self.build_train_dataset(self.config["build_info"]["storage"])
        dataset.sample_ratio = self.config.get("sample_ratio")
        dataset.batch_size = self.config.get("batch_size")
        return {"train": dataset}

    def build_processors(self):
        """Fill `vis_processors` and `text_processors`, both {split: processor}, from the section."""
        where = f"datasets.{self.name}"
        self.vis_processors, self.text_processors = _processors(self.config, where)

    def build_train_dataset(self, storage):
        """Return the dataset that lies at `storage`."""
        raise NotImplementedError(f"{type(self).__name__}.build_train_dataset")

    @classmethod
    def preflight(cls, cfg, where):
        """Return the problems of the section as lines `full key: problem`; opens no data."""
        problems = cls.storage_problems(cfg["build_info"]["storage"], f"{where}.build_info.storage")
        try:
            _processors(cfg, where)
        except ValueError as error:
            problems.append(str(error))
        for key, unit in (("sample_ratio", "a number"), ("batch_size", "an integer")):
            if cfg.get(key) is not None and not cfg[key] > 0:
                problems.append(f"{where}.{key}: {cfg[key]}; expected {unit} above 0")
        return problems

    @classmethod
    def storage_problems(cls, storage, where):
        """Return what is wrong with the data's path, as lines that begin with the key `where`."""
        return []


def _processors(cfg, where):
    """Return ({split: image processor}, {split: caption processor}). Raises ValueError that names the key."""
    vis, text = ({split: _processor(cfg, role, split, where) for split in SPLITS} for role in _ROLES)
    if vis["train"] is None:
        raise ValueError(
            f"{where}.vis_processor.train: missing; name an image processor, e.g. "
            "{name: blip2_image_train, image_size: 224}"
        )
    return vis, {split: processor or BaseProcessor() for split, processor in text.items()}


_ROLES = ("vis_processor", "text_processor")


def _processor(cfg, role, split, where):
    section = (cfg.get(role) or {}).get(split)
    if not section:
        return None
    if not section.get("name"):
        raise ValueError(f"{where}.{role}.{split}.name: missing; known: {', '.join(registry.list_processors())}")
    try:
        return registry.get_processor_class(section["name"]).from_config(section)
    except ValueError as error:
        raise ValueError(f"{where}.{role}.{split}: {error}") from error
