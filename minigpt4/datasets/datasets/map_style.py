"""Datasets as torch knows them, and as they were written for the 2023 release, in the place of the package's own."""

from typing import Any

from torch.utils.data import IterableDataset

from minigpt4.datasets.datasets.base_dataset import BaseDataset, Place, SampleIndex, SkipSample, seeded_by
from minigpt4.datasets.datasets.image_text_dataset import ImageTextDataset
from minigpt4.datasets.datasets.record_text import whole_text


def adapted(dataset: Any, name: str, vis_processor: Any = None) -> BaseDataset:
    """Return a dataset as the loader and `inspect` take it: itself, or a MapStyleDataset of it.

    Raises ValueError, which names the section, for what is neither map-style nor a stream of ours.
    """
    is_ours = getattr(type(dataset), "__getitem__", None) is ImageTextDataset.__getitem__
    if is_ours or (isinstance(dataset, BaseDataset) and isinstance(dataset, IterableDataset)):
        return dataset
    lacking = [method for method in ("__len__", "__getitem__") if not hasattr(type(dataset), method)]
    if lacking or isinstance(dataset, IterableDataset):
        found = f"{type(dataset).__module__}.{type(dataset).__qualname__}"
        has = f"has no {' and no '.join(lacking)}" if lacking else "is a stream"
        raise ValueError(
            f"datasets.{name}: {found} {has}; a dataset needs __len__ and __getitem__(index), a stream must be a "
            "subclass of WebCaptionDataset: docs/custom_data.md"
        )
    return MapStyleDataset(dataset, name, vis_processor)


class MapStyleDataset(ImageTextDataset):
    """Any dataset with `__len__` and `__getitem__(int)`, whose samples have "image" and "text_input".

    What a processor draws from torch's generator is seeded by the run. A sample that ends in a SkipSample or an OSError
    (Pillow's for a broken image is one) is counted, and the next one stands in.
    """

    def __init__(self, dataset: Any, name: str, vis_processor: Any = None):
        self.dataset = dataset
        super().__init__(list(range(len(dataset))), "", getattr(dataset, "vis_processor", vis_processor), None, name)
        self.sample_ratio = getattr(dataset, "sample_ratio", None)
        self.batch_size = getattr(dataset, "batch_size", None)

    def bind(self, place: Place, num_workers: int = 0, max_bad_fraction: float = 0.05) -> None:
        super().bind(place, num_workers, max_bad_fraction)
        if isinstance(self.dataset, BaseDataset):
            self.dataset.bind(place, num_workers, max_bad_fraction)

    def load(self, record: int, epoch: int) -> dict:
        try:
            with seeded_by(self.place.seed, epoch, record):
                sample = dict(self.dataset[SampleIndex(record, epoch)])
        except OSError as error:
            raise SkipSample("bad_image", f"{type(error).__name__}: {error}") from error
        if isinstance(sample.get("text_input"), str):
            sample["text_input"] = whole_text(sample["text_input"])
        return {"sample_id": self.label_of(record)} | sample

    def label_of(self, record: int) -> str:
        return f"record {record}"

    image_of = label_of
