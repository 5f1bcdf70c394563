"""Samples with any number of images, from a user's own dataset through the real loader."""

import itertools

import pytest
import torch
from torch.utils.data import Dataset

from minigpt4.common.device import to_device
from minigpt4.datasets.datasets.base_dataset import BaseDataset
from minigpt4.datasets.datasets.collate import collate
from minigpt4.processors import Blip2ImageEvalProcessor, load_rgb
from tests.datasets.shards import jpeg, loader

CPU = torch.device("cpu")


class Albums(BaseDataset, Dataset):
    """Record i has `counts[i]` images, numbered from i * 10 on; None: a single "image", as in other datasets."""

    def __init__(self, counts, vis_processor=None):
        self.annotation = counts
        super().__init__(vis_processor or Blip2ImageEvalProcessor(image_size=8), name="albums")

    def __len__(self):
        return len(self.annotation)

    def __getitem__(self, index):
        epoch, index = index if isinstance(index, tuple) else (0, index)
        number = self.annotation[index]
        images = [
            load_rgb(jpeg(index * 10 + image)) for image in range(1 if number is None else number)
        ]
        self.skips.usable()
        text = (("How many?", f"{number}."),)
        sample = self.prepare(images[0] if number is None else images, text, epoch, index)
        return sample | {"sample_id": str(index)}


def expected(batch, counts):
    """Return the images that a batch must contain according to its IDs, each processed by itself."""
    process, images = Blip2ImageEvalProcessor(image_size=8), []
    for sample_id in batch["sample_id"]:
        index = int(sample_id.removeprefix("albums/"))
        images += [process(load_rgb(jpeg(index * 10 + image))) for image in range(counts[index])]
    return images


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_of_a_batch_are_in_the_order_of_its_samples(num_workers):
    counts = [2, 0, 1, 3, 0, 1, 0]
    batches = loader([Albums(counts)], batch_size=3, num_workers=num_workers)
    for raw in itertools.islice(batches, 7):
        batch = to_device(raw, CPU)
        images = expected(batch, counts)
        assert batch["num_images"] == [
            counts[int(name.removeprefix("albums/"))] for name in batch["sample_id"]
        ]
        assert len(batch["turns"]) == len(batch["text_input"]) == len(batch["num_images"]) == 3
        assert len(images) == sum(batch["num_images"]) == len(batch["image"])
        assert batch["image"].dtype == torch.float32 and "normalise" not in batch
        assert not images or torch.equal(batch["image"], torch.stack(images))
        # the training log takes the number of samples from the first value of a batch
        assert len(next(iter(raw.values()))) == 3


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_without_any_image(num_workers):
    batch = next(loader([Albums([0, 0])], batch_size=2, num_workers=num_workers))
    assert "normalise" not in batch
    batch = to_device(batch, CPU)
    assert (batch["image"].shape, batch["image"].dtype, batch["num_images"]) == (
        (0, 3, 0, 0),
        torch.float32,
        [0, 0],
    )
    assert batch["text_input"] == ["0.", "0."]


def test_images_are_sent_as_bytes_if_the_processor_allows_it():
    batch = next(loader([Albums([1, 2])], batch_size=2))
    assert (batch["image"].dtype, batch["image"].shape) == (torch.uint8, (3, 8, 8, 3))
    own = next(
        loader(
            [Albums([1, 2], vis_processor=lambda image: torch.full((3, 8, 8), 0.5))], batch_size=2
        )
    )
    assert (own["image"].dtype, own["image"].shape) == (
        torch.float32,
        (3, 3, 8, 8),
    ) and "normalise" not in own


def test_samples_with_one_image_each_give_a_plain_batch():
    batch = next(loader([Albums([None, None])], batch_size=2))
    assert batch.keys() == {"image", "normalise", "text_input", "turns", "sample_id"}
    assert to_device(batch, CPU)["image"].shape == (2, 3, 8, 8)


def test_both_forms_in_one_batch():
    image = torch.rand(3, 2, 2)
    batch = collate(
        [{"image": image, "text_input": "a"}, {"images": [image + 1, image], "text_input": "b"}]
    )
    assert batch["num_images"] == [1, 2] and torch.equal(
        batch["image"], torch.stack([image, image + 1, image])
    )


@pytest.mark.parametrize("largest", [2**63 - 1, 2**63])
def test_image_ids_that_are_hashes_are_kept(largest):
    image, ids = torch.rand(3, 2, 2), [-(2**63), largest]
    found = collate([{"image": image, "image_id": each} for each in ids])["image_id"]
    assert list(map(int, found)) == ids and torch.is_tensor(found) == (largest < 2**63)
