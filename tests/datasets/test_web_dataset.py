"""The tar pipeline: order, sharing among ranks and workers, skipping and its limit, malicious shards."""

import functools
import http.server
import io
import itertools
import json
import os
import pickle
import random
import re
import shutil
import tarfile
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from webdataset.filters import shuffle

from minigpt4.datasets.datasets import web_dataset
from minigpt4.datasets.datasets.base_dataset import Place
from minigpt4.datasets.datasets.collate import collate
from minigpt4.datasets.datasets.skips import PROBATION, DataError
from minigpt4.datasets.datasets.web_dataset import (
    RawSample,
    WebCaptionDataset,
    expand_shards,
    shuffled,
)
from tests.datasets.shards import ids, jpeg, loader, pair, shard, stream, write_tar
from tests.survival.processes import bytes_read

# three workers on two cores are meant
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def one_pass(dataset, num_workers=0, place=None):
    """Return the sample ids of a finite dataset, read by its own DataLoader."""
    dataset.bind(place or Place(), num_workers)
    batches = DataLoader(dataset, batch_size=2, num_workers=num_workers, collate_fn=collate)
    return ids(batches)


@pytest.fixture
def two_shards(tmp_path):
    """Two shards, 10 + 5 samples: one image is corrupt, one caption is null."""
    first = {f"{number:06d}": pair(number) for number in range(10)}
    first["000003"]["jpg"] = first["000003"]["jpg"][:200]
    second = {f"{number:06d}": pair(number) for number in range(10, 15)}
    second["000012"]["json"] = b'{"caption": null}'
    write_tar(tmp_path / "00000.tar", first)
    write_tar(tmp_path / "00001.tar", second)
    return str(tmp_path / "{00000..00001}.tar")


@pytest.fixture
def eight_shards(tmp_path):
    for number in range(8):
        shard(tmp_path, f"{number:05d}", range(10 * number, 10 * number + 5))
    return str(tmp_path / "*.tar")


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_unusable_samples_are_skipped_and_counted_exactly(two_shards, num_workers):
    dataset = stream(two_shards, epochs=1)
    seen = one_pass(dataset, num_workers)
    assert sorted(seen) == sorted(
        f"0000{number // 10}.tar/{number:06d}" for number in range(15) if number not in (3, 12)
    )
    assert dataset.skips.report() == {"seen": 15, "bad_image": 1, "bad_caption": 1}


def test_each_reason_has_its_count(tmp_path):
    bomb = io.BytesIO()
    Image.new("1", (70_000, 1_000)).save(bomb, "PNG")
    write_tar(
        tmp_path / "0.tar",
        {
            "0": {"json": b'{"caption": "no image"}', "mp4": b"film"},
            "1": {"jpg": jpeg(1)},
            "2": {"jpg": jpeg(2), "json": b"{"},
            "3": {"jpg": jpeg(3), "json": b'{"width": 3}'},
            "4": {"jpg": jpeg(4), "json": b'{"caption": 7}'},
            "5": {"jpg": jpeg(5), "txt": b"\xff\xfe"},
            "6": {"png": bomb.getvalue(), "txt": b"70 million pixels"},
            "7": {"JPG": jpeg(7), "txt": "Text für alle".encode()},
            "8": {"jpg": jpeg(8), "json": b'{"caption": "json comes first"}', "txt": b"txt"},
        },
    )
    dataset = stream(str(tmp_path / "0.tar"), epochs=1)
    samples = {sample["sample_id"]: sample["text_input"] for sample in dataset}
    assert samples == {"0.tar/7": "Text für alle", "0.tar/8": "json comes first"}
    assert dataset.skips.report() == {
        "seen": 9,
        "no_image": 1,
        "no_caption": 2,
        "bad_record": 1,
        "bad_caption": 2,
        "bad_image": 1,
    }


@pytest.mark.parametrize(
    "fault", ["missing", "empty file", "empty tar", "garbage", "truncated", "a folder"]
)
def test_a_broken_shard_does_not_affect_the_next_one(tmp_path, fault):
    good = shard(tmp_path, "good", range(5))
    bad = tmp_path / "bad.tar"
    kept = 0
    if fault == "empty file":
        bad.write_bytes(b"")
    elif fault == "empty tar":
        write_tar(bad, {})
    elif fault == "garbage":
        bad.write_bytes(b"<html>" * 1000)
    # in the image of the fifth sample, whose key is also in the good shard
    elif fault == "truncated":
        shard(tmp_path, "bad", range(5))
        content = bad.read_bytes()
        bad.write_bytes(content[: content.index(b"000004.jpg") + 700])
        # the sample before the cut is dropped too, because it may be incomplete
        kept = 4 - 1
    elif fault == "a folder":
        bad.mkdir()
    dataset = stream([good, str(bad)], epochs=1)
    seen = one_pass(dataset)
    assert sum(sample.startswith("good.tar/") for sample in seen) == 5
    assert len(seen) == 5 + kept
    assert dataset.skips.report() == {"seen": len(seen) + 1, "bad_shard": 1}


def test_a_broken_shard_is_counted_once_by_all_workers_together(tmp_path):
    good = shard(tmp_path, "good", range(6))
    dataset = stream([good, str(tmp_path / "missing.tar")], epochs=1)
    assert len(one_pass(dataset, num_workers=3)) == 6
    assert dataset.skips.report() == {"seen": 7, "bad_shard": 1}


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pickle", "pth", "npy", "cbor"])
def test_a_hostile_member_is_never_decoded(tmp_path, extension):
    trap = tmp_path / "created"
    members = pair(0) | {extension: pickle.dumps(Payload(trap))}
    dataset = stream(
        write_tar(tmp_path / "0.tar", {"0": members, "1": {extension: members[extension]}}),
        epochs=1,
    )
    assert one_pass(dataset) == ["0.tar/0"]
    assert not trap.exists()
    pickle.loads(members[extension])  # the payload works
    assert trap.exists()


@pytest.mark.parametrize(
    "location", ["pipe:touch created", "pipe:cat {0..3}.tar", "ftp://host/0.tar", ["a.tar", 3]]
)
def test_other_addresses_are_rejected(location):
    with pytest.raises(
        ValueError, match=r"refused; shards are local files, http\(s\) URLs, or|expected text"
    ):
        stream(location)


def test_shard_patterns_expand(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARDS", str(tmp_path))
    files = [shard(tmp_path, name, []) for name in ("00008", "00009", "00010")]
    assert expand_shards("$SHARDS/{00008..00010}.tar") == files
    assert expand_shards("${SHARDS}/*.tar") == files
    assert expand_shards([files[1], f"{tmp_path}/{{00008,00010}}.tar"]) == [
        files[1],
        files[0],
        files[2],
    ]
    assert expand_shards("https://example.org/{0..1}.tar") == [
        f"https://example.org/{n}.tar" for n in (0, 1)
    ]
    assert expand_shards(f"{tmp_path}/none*.tar") == []


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads URLs through curl")
def test_shards_are_read_from_urls(tmp_path):
    shard(tmp_path, "0", range(3))
    handler = functools.partial(SilentHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        dataset = stream(f"http://127.0.0.1:{server.server_port}/{{0..1}}.tar", epochs=1)
        assert sorted(one_pass(dataset)) == [f"0.tar/{number:06d}" for number in range(3)]
        server.shutdown()
    assert dataset.skips.report() == {"seen": 4, "bad_shard": 1}


class SilentHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def first_epoch(location, seed=0, rank=0, world_size=1):
    """Return the IDs of one rank's first epoch."""
    return one_pass(stream(location, epochs=1), place=Place(seed, rank, world_size))


def test_the_seed_sets_the_order(eight_shards):
    assert first_epoch(eight_shards, seed=1) == first_epoch(eight_shards, seed=1)
    assert first_epoch(eight_shards, seed=1) != first_epoch(eight_shards, seed=2)
    assert sorted(first_epoch(eight_shards, seed=1)) == sorted(first_epoch(eight_shards, seed=2))


def test_epochs_differ_in_order_but_not_in_content(eight_shards):
    seen = one_pass(stream(eight_shards, epochs=2))
    assert sorted(seen[:40]) == sorted(seen[40:])
    assert len(set(seen)) == 40
    assert seen[:40] != seen[40:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_together_read_each_sample_once_per_epoch(eight_shards, num_workers):
    parts = [
        one_pass(stream(eight_shards, epochs=1), num_workers, Place(7, rank, 2))
        for rank in range(2)
    ]
    assert sorted(itertools.chain(*parts)) == sorted(first_epoch(eight_shards))
    assert [len(part) for part in parts] == [20, 20]


@pytest.mark.parametrize("num_shards", [1, 3])
def test_fewer_shards_than_consumers_still_feed_every_consumer(tmp_path, caplog, num_shards):
    for number in range(num_shards):
        shard(tmp_path, f"{number}", range(20 * number, 20 * number + 20))
    parts = []
    with caplog.at_level("INFO"):
        for rank in range(2):
            dataset = stream(f"{tmp_path}/*.tar", epochs=1)
            parts.append(one_pass(dataset, num_workers=2, place=Place(0, rank, 2)))
    assert all(abs(len(part) - 10 * num_shards) <= 2 for part in parts)
    assert len(set(parts[0]) | set(parts[1])) == len(parts[0]) + len(parts[1]) == 20 * num_shards
    messages = [record.message for record in caplog.records if "walks all shards" in record.message]
    assert messages == [
        f"laion: {num_shards} shard(s) for 2 rank(s) x 2 worker(s): each worker walks all shards and takes one "
        "sample in 4"
    ]


def test_with_fewer_samples_than_consumers_each_consumer_gets_all_over_time(tmp_path):
    shard(tmp_path, "0", range(3))
    dataset = stream(f"{tmp_path}/0.tar")
    dataset.bind(Place(0, rank=6, world_size=8))
    seen = {sample["sample_id"] for sample in itertools.islice(dataset, 6)}
    assert seen == {f"0.tar/{number:06d}" for number in range(3)}


def test_a_stream_resumes_exactly(two_shards):
    dataset = stream(two_shards)
    dataset.bind(Place(3))
    samples = list(itertools.islice(dataset, 40))
    for cut in (1, 9, 13, 27):
        again = stream(two_shards)
        again.bind(Place(3))
        again.start = {0: samples[cut - 1]["stream"]}
        for expected, sample in zip(samples[cut:], again, strict=False):
            assert sample["sample_id"] == expected["sample_id"]
            assert torch.equal(sample["image"], expected["image"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
def test_resuming_takes_proportional_time_and_decodes_nothing(tmp_path):
    whole = write_tar(
        tmp_path / "0.tar", {f"{number:06d}": pair(number % 5) for number in range(100)}
    )
    for number in range(1, 55):
        os.link(whole, tmp_path / f"{number}.tar")
    decoded, read = [], {}

    def processor(image):
        decoded.append(image)
        return torch.zeros(1)

    for count in (1500, 2500, 3500):  # the shuffle buffer is full
        dataset = WebCaptionDataset(f"{tmp_path}/{{0..54}}.tar", processor, name="laion")
        dataset.start = {0: (0, count)}
        before = bytes_read()
        assert next(iter(dataset))["stream"] == (0, count + 1)
        read[count] = bytes_read() - before
        assert len(decoded) == 1 and not decoded.clear()
        assert dataset.skips.report() == {"seen": 1}
    # all shards but the last are read completely: 1000 samples are 10 shards, so one more or less is 10 %
    assert read[3500] - read[2500] == pytest.approx(read[2500] - read[1500], rel=0.1)
    assert read[2500] - read[1500] == pytest.approx(10 * os.path.getsize(whole), rel=0.1)


def test_augmentation_depends_on_the_sample_and_leaves_torchs_generator_alone(eight_shards):
    def images(num_workers):
        dataset = stream(eight_shards, epochs=1)
        dataset.bind(Place(5), num_workers)
        batches = DataLoader(dataset, batch_size=1, num_workers=num_workers, collate_fn=collate)
        return {batch["sample_id"][0]: batch["image"] for batch in batches}

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    alone, shared = images(0), images(2)
    torch.manual_seed(0)
    next(iter(stream(eight_shards)))
    assert torch.equal(torch.rand(3), expected)
    assert alone.keys() == shared.keys()
    assert all(torch.equal(alone[key], shared[key]) for key in alone)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_no_usable_sample_among_the_first_thousand_ends_the_run(tmp_path, num_workers):
    samples = {
        f"{number:06d}": {"txt": b"a caption", "heic": b"HEIC"} for number in range(PROBATION + 5)
    }
    dataset = stream(write_tar(tmp_path / "0.tar", samples))
    with pytest.raises(DataError) as error:
        next(loader([dataset], num_workers=num_workers))
    assert str(error.value) == (
        "laion: 1000 of the first 1000 samples had no 'jpg' + 'json' pair (first keys: heic, txt); "
        "see dataset/README_1_STAGE.md"
    )
    assert error.value.__suppress_context__


def test_a_pass_without_a_usable_sample_ends_the_run(tmp_path):
    location = write_tar(
        tmp_path / "0.tar", {"0": {"jpg": b"no image", "txt": b"a"}, "1": {"jpg": jpeg(1)}}
    )
    with pytest.raises(
        DataError,
        match=r"2 of the first 2 samples were unusable \(1 no_caption, 1 bad_image; last: ",
    ):
        next(loader([stream(location)]))
    with pytest.raises(
        DataError, match=r"2 of the first 2 samples were unusable \(2 bad_shard; last: "
    ):
        next(loader([stream(f"{tmp_path}/{{8..9}}.tar")]))


def test_more_bad_samples_than_the_limit_end_the_run(tmp_path):
    samples = {f"{number:06d}": pair(1, "a") for number in range(400)}
    for number in range(0, 400, 10):
        samples[f"{number:06d}"] = {"jpg": b"broken", "json": b'{"caption": "a"}'}
    location = write_tar(tmp_path / "00017.tar", samples)
    strict = loader([stream(location, name="cc_sbu")], batch_size=32, max_bad_fraction=0.05)
    with pytest.raises(DataError) as error:
        list(itertools.islice(strict, 40))
    assert re.fullmatch(
        r"cc_sbu: (9|10)\.\d% of 10\d\d samples were unusable \(limit 5%, run\.max_bad_fraction\): "
        r"\d+ bad_image; last: 00017\.tar 000\d\d0 UnidentifiedImageError: .*",
        str(error.value),
    )
    tolerant = loader([stream(location, name="cc_sbu")], batch_size=32, max_bad_fraction=0.2)
    assert len(list(itertools.islice(tolerant, 40))) == 40


def test_skipping_is_fast(tmp_path):
    samples = {
        f"{number:06d}": {"jpg": b"broken", "json": b'{"caption": "a"}'} for number in range(200)
    }
    samples["000200"] = pair(0)
    dataset = stream(write_tar(tmp_path / "0.tar", samples), epochs=1)
    start = os.times()
    assert len(one_pass(dataset)) == 1
    assert os.times().elapsed - start.elapsed < 2  # a wait of half a second each would be 100 s


def test_json_of_img2dataset_is_read(tmp_path):
    """The members and keys that img2dataset writes; `txt` holds the caption a second time."""
    meta = {
        "url": "http://x",
        "caption": "A Cat",
        "key": "0",
        "status": "success",
        "width": 256,
        "exif": "{}",
    }
    members = {"jpg": jpeg(0), "txt": b"A Cat", "json": json.dumps(meta).encode()}
    sample = next(iter(stream(write_tar(tmp_path / "00000.tar", {"000000000": members}))))
    assert sample["text_input"] == "A Cat"
    assert sample["sample_id"] == "00000.tar/000000000"
    assert sample["image"].shape == (3, 8, 8)


@pytest.mark.parametrize("number", [0, 1, 99, 100, 150, 1000, 1001, 2500])
def test_the_shuffle_order_equals_webdatasets(number):
    raws = [RawSample("0.tar", str(key), {"jpg": b"1234"}, ("jpg",)) for key in range(number)]
    expected = shuffle(1000, initial=100, rng=random.Random(5))(iter(raws))
    assert list(shuffled(iter(raws), random.Random(5))) == list(expected)


def test_the_shuffle_buffer_is_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(web_dataset, "SHUFFLE_BYTES", 100)
    taken = []

    def raws():
        for key in range(300):
            taken.append(key)
            yield RawSample("0.tar", str(key), {"jpg": bytes(10)}, ("jpg",))

    seen = []
    for raw in shuffled(raws(), random.Random(5)):
        seen.append(int(raw.key))
        assert len(taken) - len(seen) <= 12
    assert sorted(seen) == list(range(300)) and seen != sorted(seen)


def test_samples_lost_to_dots_in_names_are_counted(tmp_path):
    samples = {f"{number:05d}": pair(1) for number in range(60)}
    samples |= {
        f"{number:05d}.{part}": {part: pair(1)[part]}
        for number in range(60, 530)
        for part in ("jpg", "json")
    }
    location = write_tar(tmp_path / "0.tar", samples)
    with pytest.raises(
        DataError, match=r"9\d\.\d% of 1000 samples were unusable .* one name up to the last dot"
    ):
        list(itertools.islice(loader([stream(location)], batch_size=8), 400))


def test_a_name_that_is_not_utf8_gives_a_normal_sample(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for extension, data in pair(0).items():
            info = tarfile.TarInfo(f"caf\udce9.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    dataset = stream(str(tmp_path / "0.tar"), epochs=1)
    dataset.set_split(is_val=False, val_fraction=1e-9)
    assert one_pass(dataset) == ["0.tar/caf\\xe9"]


def test_the_loss_of_the_rest_of_a_damaged_shard_is_reported(tmp_path, caplog):
    shard(tmp_path, "bad", range(9))
    content = bytearray((tmp_path / "bad.tar").read_bytes())
    content[content.index(b"000005.jpg") + 2] ^= 1
    (tmp_path / "bad.tar").write_bytes(content)
    dataset = stream([str(tmp_path / "bad.tar"), shard(tmp_path, "good", range(3))], epochs=1)
    assert len(one_pass(dataset)) == 4 + 3
    assert dataset.skips.report() == {"seen": 8, "bad_shard": 1}
    assert "bad checksum; samples read of it: 4, none behind that" in caplog.text


def test_a_fifo_in_place_of_a_shard_is_counted_and_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "fifo.tar")
    dataset = stream([str(tmp_path / "fifo.tar"), shard(tmp_path, "good", range(3))], epochs=1)
    assert len(one_pass(dataset)) == 3
    assert dataset.skips.report() == {"seen": 4, "bad_shard": 1}
