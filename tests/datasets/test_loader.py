"""Mixing, batches, seeds and ranks of the training loader."""

import itertools
import os
import socket
from multiprocessing import resource_sharer

import numpy as np
import pytest
import torch

from minigpt4.common.device import to_device
from minigpt4.datasets.datasets.caption_datasets import CaptionDataset
from minigpt4.processors import Blip2ImageTrainProcessor
from tests.datasets.shards import folder_dataset, ids, loader, pair, shard, stream, write_tar


@pytest.fixture
def laion(tmp_path):
    (tmp_path / "laion").mkdir()
    for number in range(4):
        shard(tmp_path / "laion", number, range(20 * number, 20 * number + 20))
    return lambda: stream(f"{tmp_path}/laion/*.tar", name="laion")


@pytest.fixture
def cc_sbu(tmp_path):
    (tmp_path / "cc_sbu").mkdir()
    shard(tmp_path / "cc_sbu", "c", range(30))
    return lambda: stream(f"{tmp_path}/cc_sbu/c.tar", name="cc_sbu")


def take(batches, number):
    return list(itertools.islice(batches, number))


def test_a_batch_has_the_keys_and_types_that_the_model_reads(laion, tmp_path):
    batch = to_device(next(loader([laion()], num_workers=1)), torch.device("cpu"))
    assert batch.keys() == {"image", "text_input", "sample_id"}
    assert batch["image"].shape == (4, 3, 8, 8)
    assert batch["image"].dtype == torch.float32
    assert all(isinstance(text, str) for text in batch["text_input"] + batch["sample_id"])
    batch = to_device(next(loader([folder_dataset(tmp_path, range(6))])), torch.device("cpu"))
    assert batch.keys() == {"image", "text_input", "sample_id", "image_id"}
    assert batch["image_id"].dtype == torch.int64


def test_ratios_hold_per_batch(laion, cc_sbu):
    datasets = [laion(), cc_sbu()]
    datasets[0].sample_ratio, datasets[1].sample_ratio = 115, 14
    batches = take(loader(datasets, batch_size=1, seed=3), 2000)
    share = np.mean([batch["sample_id"][0].startswith("cc_sbu/") for batch in batches])
    # 14/129 = 0.1085; four standard deviations of 2000 draws are 0.028
    assert share == pytest.approx(14 / 129, abs=0.028)


def test_a_batch_comes_from_one_dataset(laion, cc_sbu):
    for batch in take(loader([laion(), cc_sbu()], seed=1), 20):
        assert len({sample_id.split("/")[0] for sample_id in batch["sample_id"]}) == 1


def test_equal_ratios_without_any_and_an_error_with_some(laion, cc_sbu):
    assert loader([laion(), cc_sbu()]).ratios.tolist() == [0.5, 0.5]
    assert loader([laion(), cc_sbu()], [3, 1]).ratios.tolist() == [0.75, 0.25]
    for wrong, expected in ((None, "None"), (0, "0"), (-2, "-2"), (float("nan"), "nan")):
        with pytest.raises(
            ValueError,
            match=rf"^datasets.cc_sbu.sample_ratio: {expected}; expected a number above 0",
        ):
            loader([laion(), cc_sbu()], [115, wrong])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_equal_seeds_give_equal_batches(laion, cc_sbu, num_workers):
    def run(seed, rank=0):
        torch.manual_seed(torch.seed() % 1000)  # the global generator must have no influence
        settings = {"seed": seed, "rank": rank, "world_size": 2, "num_workers": num_workers}
        return take(loader([laion(), cc_sbu()], [2, 1], **settings), 12)

    first, again, other, neighbour = run(1), run(1), run(2), run(1, rank=1)
    assert ids(first) == ids(again)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, again, strict=True))
    assert ids(first) != ids(other)
    assert ids(first) != ids(neighbour)


def test_the_loader_leaves_torchs_generator_alone(laion, tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(loader([laion(), folder_dataset(tmp_path, range(6))], num_workers=1), 4)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_together_read_each_record_once_per_epoch(tmp_path, world_size):
    by_rank = []
    for rank in range(world_size):
        batches = loader(
            [folder_dataset(tmp_path, range(12))],
            batch_size=1,
            seed=5,
            rank=rank,
            world_size=world_size,
        )
        by_rank.append(ids(take(batches, 24 // world_size)))
    taken = list(itertools.chain(*zip(*by_rank, strict=True)))
    assert (
        sorted(taken[:12])
        == sorted(taken[12:])
        == sorted(f"cc_sbu_align/{number}" for number in range(12))
    )
    assert taken[:12] != taken[12:]


def test_a_dataset_smaller_than_a_batch_repeats(tmp_path):
    batches = loader([folder_dataset(tmp_path, range(3))], batch_size=7)
    seen = ids(take(batches, 3))
    assert len(seen) == 21
    assert {seen.count(f"cc_sbu_align/{number}") for number in range(3)} == {7}
    assert batches.epoch_length() == 1


def test_the_epoch_length(tmp_path, laion):
    assert (
        loader([folder_dataset(tmp_path, range(13))], batch_size=3, world_size=2).epoch_length()
        == 3
    )
    own = folder_dataset(tmp_path, range(13))
    own.batch_size = 13
    assert loader([own], batch_size=3).epoch_length() == 1
    assert next(loader([own], batch_size=3))["image"].shape[0] == 13
    assert loader([laion(), own]).epoch_length() is None


def test_the_report_names_each_dataset(tmp_path, laion):
    folder = folder_dataset(tmp_path, range(4))
    (tmp_path / "image" / "2.jpg").write_bytes(b"broken")
    batches = loader([laion(), folder], batch_size=4)
    while batches.skip_report()["cc_sbu_align"].get("bad_image", 0) < 2:
        next(batches)
    report = batches.skip_report()
    assert set(report) == {"laion", "cc_sbu_align"}
    assert set(report["laion"]) <= {"seen"}
    assert report["cc_sbu_align"]["seen"] > 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_state_has_the_position_of_each_workers_stream(laion, num_workers):
    batches = loader([laion()], num_workers=num_workers, seed=9)
    take(batches, 6)
    each = 24 // max(1, num_workers)
    progress = batches.state()["progress"]["laion"]
    assert progress["batches"] == 6
    positions = {
        worker: (tuple(position), sum(counts))
        for worker, (position, counts) in progress["workers"].items()
    }
    assert positions == dict.fromkeys(range(max(1, num_workers)), ((0, each), each))


@pytest.fixture
def mixed(tmp_path, laion):
    """Return a function that makes three datasets: with broken shards and images, with few samples, and a folder."""
    (tmp_path / "laion" / "0.tar").write_bytes(b"no tar at all")
    whole = (tmp_path / "laion" / "2.tar").read_bytes()
    (tmp_path / "laion" / "2.tar").write_bytes(whole[: len(whole) // 2 + 100])
    (tmp_path / "small").mkdir()
    samples = {f"{number:06d}": pair(number) for number in range(9)} | {
        "000009": {"jpg": b"broken", "txt": b"a"}
    }
    write_tar(tmp_path / "small" / "s.tar", samples)
    folder_dataset(tmp_path, range(11))
    (tmp_path / "image" / "3.jpg").write_bytes(b"broken")

    def make():
        processor = Blip2ImageTrainProcessor(image_size=8)
        folder = CaptionDataset(
            processor, None, tmp_path / "image", [tmp_path / "filter_cap.json"], "cc_sbu_align"
        )
        return [laion(), stream(f"{tmp_path}/small/s.tar", name="cc_sbu"), folder]

    return make


@pytest.mark.parametrize("cut", [1, 7, 40])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_resumed_equals_uninterrupted(mixed, num_workers, cut, tmp_path):
    """Compares IDs, images and counts on both ranks; the state goes through a file that is loaded with weights_only."""
    for rank in range(2):
        settings = {
            "num_workers": num_workers,
            "seed": 3,
            "rank": rank,
            "world_size": 2,
            "batch_size": 3,
        }
        whole = loader(mixed(), [2, 1, 1], **settings)
        take(whole, cut)
        torch.save(whole.state(), tmp_path / "state.pth")
        expected = take(whole, 30)
        rest = loader(mixed(), [2, 1, 1], **settings)
        rest.resume(torch.load(tmp_path / "state.pth", weights_only=True))
        found = take(rest, 30)
        assert ids(found) == ids(expected)
        assert all(
            torch.equal(a["image"], b["image"]) for a, b in zip(found, expected, strict=True)
        )
        assert rest.skip_report() == whole.skip_report()
        assert rest.state() == whole.state()
    assert rest.skip_report()["laion"].keys() == {"seen", "bad_shard"}


def process_group(image):
    return torch.tensor([os.getpgrp()])


def test_workers_leave_the_trainers_process_group(laion):
    dataset = laion()
    dataset.vis_processor = process_group
    assert next(loader([dataset], num_workers=1))["image"][0].item() != os.getpgrp()


def queue_address(image):
    resource_sharer._resource_sharer._address or resource_sharer._resource_sharer._start()
    return torch.tensor(list(resource_sharer._resource_sharer._address.encode()))


def test_a_trainer_killed_while_it_receives_a_batch_leaves_no_worker_traceback(laion, capfd):
    dataset = laion()
    dataset.vis_processor = queue_address
    batches = loader([dataset], num_workers=1)
    address = bytes(next(batches)["image"][0].tolist())
    for num_bytes in (
        0,
        1,
    ):  # the second connection is answered after the first one has been handled
        with socket.socket(socket.AF_UNIX) as trainer:
            trainer.connect(address)
            assert len(trainer.recv(num_bytes)) == num_bytes
    batches.close()
    assert "Traceback" not in capfd.readouterr().err


def test_more_workers_than_cpus_give_no_warning(tmp_path, recwarn):
    batches = loader([stream(shard(tmp_path, "0", range(9)))], num_workers=os.cpu_count() + 1)
    next(batches)
    batches.close()
    assert not [warning for warning in recwarn if "worker processes" in str(warning.message)]
