"""Images are sent from workers as bytes; the model receives bit-identical values to those of the float chain."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from minigpt4.common.device import to_device
from minigpt4.datasets.datasets.base_dataset import Place, seeded_by
from minigpt4.processors import Blip2ImageEvalProcessor, Blip2ImageTrainProcessor, load_rgb
from minigpt4.processors.blip_processors import CLIP_MEAN, CLIP_STD
from minigpt4.processors.pixels import Normalise, halves
from tests.datasets.shards import folder_dataset, loader, shard, stream
from tests.golden import GOLDEN
from tests.golden.model import CONFIG, golden_model

CPU = torch.device("cpu")
IMAGES = [
    entry["file"]
    for entry in json.loads((GOLDEN / "f_image/meta.json").read_text(encoding="utf-8"))["images"]
]
ODD = ((0.1, 0.7, 0.9), (0.03, 1.7, 0.333))


@pytest.mark.parametrize(("mean", "std"), [(CLIP_MEAN, CLIP_STD), ODD])
def test_every_byte_of_every_channel_becomes_torchvisions_number(mean, std):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    expected = transforms.Normalize(mean, std)(transforms.ToTensor()(Image.fromarray(pixels)))
    result = Normalise(mean, std)(torch.from_numpy(np.stack([pixels, pixels[::-1].copy()])))
    assert torch.equal(result[0], expected) and torch.equal(result[1], expected.flip(1))
    assert result.dtype == torch.float32 and result.is_contiguous()


@pytest.mark.parametrize("file", IMAGES)
def test_both_halves_together_equal_the_processor(file):
    image = load_rgb(GOLDEN / "f_image" / file)
    for process in (Blip2ImageTrainProcessor(56), Blip2ImageEvalProcessor(56, *ODD)):
        first, last = halves(process)
        with seeded_by(0):
            expected = process(image)
        with seeded_by(0):
            pixels = first(image)
        assert torch.equal(last(pixels), expected)
        assert (pixels.dtype, pixels.shape) == (torch.uint8, (56, 56, 3))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_a_quarter_of_the_bytes_and_equal_on_the_device(tmp_path, num_workers):
    tars = [shard(tmp_path, "a", range(12))]
    expected = list(floats(stream(tars, epochs=1)))
    (batch,) = [next(loader([stream(tars)], batch_size=12, num_workers=num_workers))]
    assert (batch["image"].dtype, batch["image"].nbytes) == (torch.uint8, 12 * 3 * 8 * 8)
    batch = to_device(batch, CPU)
    assert "normalise" not in batch and batch["image"].nbytes == 4 * 12 * 3 * 8 * 8
    assert batch["sample_id"] == [f"laion/{sample['sample_id']}" for sample in expected]
    assert torch.equal(batch["image"], torch.stack([sample["image"] for sample in expected]))


def floats(dataset):
    """Return an iterator over the samples of a dataset outside of a loader: processed completely, in float32."""
    dataset.bind(Place())
    return iter(dataset)


class Jittered(Blip2ImageTrainProcessor):
    """A user's processor with a step after the normalisation."""

    def __call__(self, image):
        return super().__call__(image) * 1.5


def replaced():
    """Return a processor whose chain a user has replaced."""
    process = Blip2ImageEvalProcessor(8)
    process.transform = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])
    return process


OWN = {
    "subclass": lambda: Jittered(8),
    "replaced": replaced,
    "function": lambda: lambda image: torch.full((3, 8, 8), 0.5),
}


@pytest.mark.parametrize("name", OWN)
def test_tensors_of_a_users_own_processor_pass_unchanged(tmp_path, name):
    dataset = folder_dataset(tmp_path, range(4), processor=OWN[name]())
    expected = torch.stack([sample["image"] for sample in dataset.one_pass()])
    batch = next(loader([dataset], batch_size=4))
    assert "normalise" not in batch
    assert batch["image"].dtype == torch.float32 and torch.equal(
        to_device(batch, CPU)["image"], expected
    )


def test_the_loss_and_gradient_of_a_training_step_are_the_same(tmp_path):
    size, results = CONFIG["image_size"], []
    model = golden_model(tmp_path, end_sym="###", max_txt_len=16)
    for whole in (False, True):
        dataset = folder_dataset(tmp_path, range(3), processor=Blip2ImageTrainProcessor(size))
        batches = loader([dataset], batch_size=3)
        dataset.leaves_normalising = not whole
        batch = next(batches)
        assert batch["image"].is_floating_point() == whole
        model.zero_grad()
        loss = model(to_device(batch, CPU))["loss"]
        loss.backward()
        results.append((loss.detach(), model.llama_proj.weight.grad.clone()))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[0][1].abs().max() > 0


def test_a_batch_that_skipped_the_device_is_rejected(tmp_path):
    model, size = golden_model(tmp_path), CONFIG["image_size"]
    dataset = folder_dataset(tmp_path, range(2), processor=Blip2ImageTrainProcessor(size))
    with pytest.raises(
        ValueError, match=r"^image: torch.uint8; expected normalised images: .*\.to_device\(batch,"
    ):
        model(next(loader([dataset], batch_size=2)))
