"""Validation splits: of each builder, over ranks and workers; training without one is unchanged by them."""

import hashlib
import itertools
import json
import re
import tracemalloc
import unicodedata
from operator import itemgetter

import pytest
import torch

from minigpt4.common.config import Problem
from minigpt4.common.device import to_device
from minigpt4.common.registry import registry
from minigpt4.datasets.datasets.annotations import Record
from minigpt4.datasets.datasets.base_dataset import Place
from minigpt4.datasets.datasets.dataloader_utils import EvalLoader
from minigpt4.datasets.datasets.image_text_dataset import ImageTextDataset
from minigpt4.datasets.datasets.skips import DataError
from minigpt4.datasets.instructions.dataset import InstructionDataset, Task
from minigpt4.datasets.instructions.records import Example
from minigpt4.processors import BaseProcessor, Blip2ImageEvalProcessor, load_rgb
from tests.datasets.shards import folder_dataset, ids, jpeg, loader, pair, shard, stream, write_tar
from tests.datasets.test_builders import section
from tests.datasets.test_own_data import LLAVA
from tests.datasets.test_own_data import build as build_own

BUILDERS = (
    "laion",
    "cc_sbu",
    "webdataset",
    "cc_sbu_align",
    "image_text_folder",
    "image_text_jsonl",
)
SHARDS = BUILDERS[:3]
FRACTION = 0.3


def make_data(builder, folder, numbers):
    """Write images with captions for a builder; return the value of `storage` for them."""
    folder.mkdir(exist_ok=True)
    if builder in SHARDS:
        for first in numbers[::10]:
            shard(folder, f"{first // 10:05d}", range(first, min(first + 10, numbers[-1] + 1)))
        return f"{folder}/*.tar"
    if builder == "cc_sbu_align":
        folder_dataset(folder, numbers)
        return str(folder)
    for number in numbers:
        (folder / f"{number}.jpg").write_bytes(jpeg(number))
        (folder / f"{number}.txt").write_text(f"Caption {number}.")
    lines = [
        json.dumps({"image": f"{number}.jpg", "caption": f"Caption {number}."})
        for number in numbers
    ]
    (folder.parent / f"{folder.name}.jsonl").write_text("\n".join(lines))
    return str(folder if builder == "image_text_folder" else folder.parent / f"{folder.name}.jsonl")


def build(builder, storage, **more):
    """Return the splits of a section."""
    if builder == "image_text_jsonl":
        more["build_info"] = {"storage": storage, "images": storage.removesuffix(".jsonl")}
    return registry.get_builder_class(builder)(section(builder, storage, **more)).build_datasets()


def evaluated(dataset, rank=0, world_size=1, num_workers=0, seed=0):
    """Return one rank's batches of a validation split, as the model receives them."""
    batches = EvalLoader(dataset, Place(seed, rank, world_size), 4, num_workers, 0.5)
    return [to_device(batch, torch.device("cpu")) for batch in batches]


def captions(batches):
    return list(itertools.chain.from_iterable(batch["text_input"] for batch in batches))


def trained(dataset, number):
    """Return the captions of the first `number` samples of training."""
    return captions(itertools.islice(loader([dataset], batch_size=1), number))


@pytest.mark.parametrize("builder", BUILDERS)
def test_validation_from_separate_files(tmp_path, builder):
    """The files of `val` are read completely and in order; training reads none of them."""
    train = make_data(builder, tmp_path / "a", range(5))
    val = make_data(builder, tmp_path / "b", range(20, 26))
    info = {"storage": val} | (
        {"images": val.removesuffix(".jsonl")} if builder == "image_text_jsonl" else {}
    )
    splits = build(builder, train, val=info, text_processor={"train": {"name": "blip_caption"}})
    caption = "Caption {}." if builder == "cc_sbu_align" else "caption {}"
    assert captions(evaluated(splits["val"])) == [
        caption.format(number) for number in range(20, 26)
    ]
    assert sorted(trained(splits["train"], 5)) == [caption.format(number) for number in range(5)]
    assert (splits["train"].name, splits["val"].name) == (builder, f"{builder} val")


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_fraction_of_the_images(tmp_path, builder):
    """Each image is in one split; which one depends neither on the seed nor on other images."""
    storage = make_data(builder, tmp_path / "a", range(40))
    splits = build(builder, storage, val_fraction=FRACTION)
    held_out = captions(evaluated(splits["val"]))
    # 12 of 40 are expected; with a random hash, fewer than 4 or more than 20 have a probability of 1 in 1000
    assert 4 <= len(held_out) <= 20
    assert (
        captions(evaluated(splits["val"], seed=7)) == held_out == captions(evaluated(splits["val"]))
    )
    rest = sorted(trained(splits["train"], 40 - len(held_out)))
    assert sorted(rest + held_out) == sorted(f"Caption {number}." for number in range(40))
    make_data(builder, tmp_path / "a", range(60))
    grown = captions(evaluated(build(builder, storage, val_fraction=FRACTION)["val"]))
    assert [text for text in grown if text in rest + held_out] == held_out


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("builder", ["laion", "cc_sbu_align"])
@pytest.mark.parametrize("share", [{}, {"val_fraction": FRACTION}])
def test_ranks_and_workers_together_read_each_sample_once(tmp_path, builder, num_workers, share):
    storage = make_data(builder, tmp_path / "a", range(30))
    share = share or {"val": {"storage": storage}}
    whole = ids(evaluated(build(builder, storage, **share)["val"]))
    parts = []
    for rank in range(2):
        parts.append(ids(evaluated(build(builder, storage, **share)["val"], rank, 2, num_workers)))
    assert sorted(parts[0] + parts[1]) == sorted(whole) and len(set(whole)) == len(whole) > 3
    assert all(parts)
    if builder == "cc_sbu_align":
        assert parts == [whole[0::2], whole[1::2]]


def test_all_records_of_an_image_are_in_the_same_split(tmp_path):
    records = [{"image_id": str(number % 10), "caption": f"{number}"} for number in range(30)]
    folder_dataset(tmp_path, range(10), records)
    splits = build("cc_sbu_align", str(tmp_path), val_fraction=FRACTION)
    sides = [set(map(itemgetter("image_id"), splits[name].annotation)) for name in ("train", "val")]
    assert all(sides) and not sides[0] & sides[1]
    assert [len(splits[name]) for name in ("train", "val")] == [3 * len(side) for side in sides]


def spelt(number):
    """Return the ways to name an image that all find the same file."""
    name = f"photos/\u00e9{number}.jpg"
    return name, unicodedata.normalize("NFD", name), name.replace("/", "\\"), f"{name[:-4]}.JPG"


def of_captions(name):
    return Record(name, name, "A caption.")


def of_questions(name):
    return Example(name, name, ["Which?"], ["A cat."])


@pytest.mark.parametrize("record", [of_captions, of_questions])
def test_all_spellings_of_an_image_are_in_the_same_split(record):
    images = [list(map(record, spelt(number))) for number in range(30)]
    is_caption = record is of_captions
    data = (
        ImageTextDataset([], "", None) if is_caption else InstructionDataset([], Task(), [], None)
    )
    data.annotation = list(itertools.chain.from_iterable(images))
    data.set_split(True, FRACTION)
    counts = [sum(record in data.annotation for record in records) for records in images]
    assert set(counts) == {0, 4}


def test_a_fingerprint_is_the_hash_of_the_listing_without_its_repr_in_memory():
    data = ImageTextDataset(list(map(of_captions, map(str, range(2000)))), "", None)
    tracemalloc.start()
    found, (_, peak) = data.fingerprint, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    whole = repr(data.annotation)
    assert found == hashlib.blake2b(whole.encode(), digest_size=8).hexdigest()
    assert peak < len(whole) / 5


def test_held_out_samples_of_shards_are_counted_but_not_as_bad(tmp_path):
    storage = make_data("laion", tmp_path / "a", range(40))
    splits = build("laion", storage, val_fraction=FRACTION)
    number = len(captions(evaluated(splits["val"])))
    splits["train"].epochs = 1
    assert len(list(splits["train"])) == 40 - number
    assert splits["train"].skips.report() == {"seen": 40 - number, "held_out": number}
    assert splits["val"].skips.report() == {"seen": number}


@pytest.mark.parametrize("builder", ["cc_sbu", "image_text_folder"])
def test_nothing_is_augmented(tmp_path, builder):
    """By default the whole image, as a square with the size, mean and std of training; or the processor in `eval`."""
    storage = make_data(builder, tmp_path / "a", range(3))
    train = {
        "name": "blip2_image_train",
        "image_size": 6,
        "mean": [0.1, 0.2, 0.3],
        "std": [1.0, 2.0, 3.0],
    }
    for own, size, numbers in (
        (None, 6, ([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])),
        ({"image_size": 5}, 5, (None, None)),
    ):
        eval_processor = own and {"name": "blip2_image_eval", **own}
        cfg = {
            "vis_processor": {"train": train, "eval": eval_processor},
            "val": {"storage": storage},
        }
        (batch,) = evaluated(build(builder, storage, **cfg)["val"])
        expected = [
            Blip2ImageEvalProcessor(size, *numbers)(load_rgb(jpeg(number))) for number in range(3)
        ]
        assert torch.equal(batch["image"], torch.stack(expected))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("builder", ["laion", "cc_sbu_align"])
def test_an_unusable_sample_is_counted_and_not_replaced(tmp_path, builder, num_workers):
    folder = tmp_path / "a"
    storage = make_data(builder, folder, range(6))
    if builder == "laion":
        broken = {
            f"{number:06d}": pair(number) | ({"jpg": b"broken"} if number == 4 else {})
            for number in range(6)
        }
        write_tar(folder / "00000.tar", broken)
    else:
        (folder / "image/4.jpg").write_bytes(b"broken")
    val = build(builder, storage, val={"storage": storage})["val"]
    assert captions(evaluated(val, num_workers=num_workers)) == [
        f"Caption {number}." for number in (0, 1, 2, 3, 5)
    ]
    assert val.skips.report() == {"seen": 6, "bad_image": 1}


def test_a_split_without_a_usable_sample_says_why(tmp_path):
    write_tar(tmp_path / "0.tar", {"0": {"jpg": b"broken", "txt": b"a"}})
    val = build("laion", shard(tmp_path, "1", range(2)), val={"storage": str(tmp_path / "0.tar")})[
        "val"
    ]
    for num_workers in (0, 1):
        with pytest.raises(
            DataError,
            match=r"^laion val: 1 of the first 1 samples were unusable \(1 bad_image; last",
        ):
            evaluated(val, num_workers=num_workers)


# problems


def problems(builder, storage, **more):
    return registry.get_builder_class(builder).preflight(
        section(builder, storage, **more), "datasets.x"
    )


def test_problems_of_splits(tmp_path, own_code):
    @registry.register_processor("own_images")
    class OwnImages(BaseProcessor):
        """A processor of the user."""

    good = make_data("laion", tmp_path / "a", range(3))
    assert (
        problems("laion", good, val={"storage": good})
        == problems("laion", good, val_fraction=0.1)
        == []
    )
    absent = f"no file matches '{tmp_path}/none.tar' (first missing: {tmp_path}/none.tar)"
    (problem,) = problems("laion", good, val={"storage": f"{tmp_path}/none.tar"})
    assert problem == Problem("datasets.x.val.storage", absent)
    (problem,) = problems("laion", good, val_fraction=1.5)
    assert problem == Problem("datasets.x.val_fraction", "1.5; expected a number between 0 and 1")
    (problem,) = problems("laion", good, val={"storage": good}, val_fraction=0.1)
    assert problem == Problem(
        "datasets.x.val_fraction", "0.1, and datasets.x.val is there; give one of them"
    )
    own = {"vis_processor": {"train": {"name": "own_images"}}, "val_fraction": 0.1}
    assert list(map(str, problems("laion", good, **own))) == [
        "datasets.x.vis_processor.eval: missing; val needs it where train is a OwnImages"
    ]


@pytest.mark.parametrize("builder", ["cc_sbu_align", "image_text_folder", "image_text_jsonl"])
def test_storage_of_val_is_checked_like_that_of_training(tmp_path, builder):
    good = make_data(builder, tmp_path / "a", range(3))
    if builder == "image_text_jsonl":  # paths start from the folder of the training images
        folder = {"storage": good, "images": good.removesuffix(".jsonl")}
        assert problems(builder, good, build_info=folder, val={"storage": good}) == []
        (problem,) = problems(
            builder, good, build_info=folder, val={"storage": good, "images": str(tmp_path)}
        )
        assert problem.message.startswith("a.jsonl line 1: no file '0.jpg' in the image folder")
    else:
        assert problems(builder, good, val={"storage": good}) == []
    *_, problem = problems(builder, good, val={"storage": f"{tmp_path}/none"})
    assert problem.key == "datasets.x.val.storage" and f"'{tmp_path}/none'" in problem.message


def test_a_fraction_that_leaves_nothing_is_rejected(tmp_path):
    storage = make_data("cc_sbu_align", tmp_path / "a", range(2))
    for fraction, split in ((0.0001, "val"), (0.9999, "train")):
        with pytest.raises(
            ValueError,
            match=rf"^datasets.cc_sbu_align.val_fraction: {fraction} leaves nothing for ",
        ):
            build("cc_sbu_align", storage, val_fraction=fraction)
        with pytest.raises(
            ValueError,
            match=f"leaves nothing for {split}; change it, or name files of its own by val",
        ):
            build("cc_sbu_align", storage, val_fraction=fraction)


def test_a_fraction_that_holds_out_none_of_the_shards_says_so(tmp_path):
    """How many samples tar files hold is known only once they have been read."""
    storage = make_data("laion", tmp_path / "a", range(2))
    splits = build("laion", storage, val_fraction=0.0001)
    with pytest.raises(
        DataError, match=r"^laion val: val_fraction 0\.0001 holds out none of the samp"
    ):
        evaluated(splits["val"])


# training


# recorded before splits existed
FINGERPRINTS = ["71c79d6e83d202c3", "eec535938c93d5fe", "b2b5b50e6f0b8c1f"]
ORDER = """align/1 align/4 align/2 align/3 align/6 align/5 laion/2/23 laion/0/6 laion/1/11 laion/1/10 laion/0/0
laion/1/14 laion/2/28 laion/1/19 laion/1/16
laion/0/8 laion/0/3 laion/0/7 own/1 own/4 align/0 align/4 laion/1/12 laion/0/5"""


@pytest.fixture
def three(tmp_path):
    """Return a function that builds three training sets: shards (`of_shards`: more keys), a folder, own records."""
    storage = make_data("laion", tmp_path / "laion", range(30))
    records = [{"image": "3.jpg", "conversations": LLAVA}]
    records += [{"image": f"{number}.jpg", "caption": f"c{number}"} for number in range(3)] + [
        {"image": "1.jpg"}
    ]

    def make(**of_shards):
        folder = folder_dataset(tmp_path, range(7))
        (tmp_path / "image/own.jsonl").write_text("\n".join(map(json.dumps, records)))
        shards = build("laion", storage, **of_shards)["train"]
        return [shards, folder, build_own("image_text_jsonl", tmp_path / "image/own.jsonl")]

    return make


def test_without_a_split_order_and_fingerprints_are_those_of_old_checkpoints(three):
    datasets = three()
    assert [dataset.fingerprint for dataset in datasets] == FINGERPRINTS
    seen = ids(itertools.islice(loader(datasets, [3, 2, 1], seed=5, batch_size=2), 12))
    short = [re.sub(r"cc_sbu_|own.jsonl line |.tar|0+(?=\d)", "", sample_id) for sample_id in seen]
    assert short == ORDER.split()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_with_a_validation_split_resumes_exactly(three, num_workers, tmp_path):
    for rank in range(2):
        settings = {
            "num_workers": num_workers,
            "seed": 3,
            "rank": rank,
            "world_size": 2,
            "batch_size": 2,
        }
        whole = loader(three(val_fraction=FRACTION), [3, 1, 1], **settings)
        list(itertools.islice(whole, 9))
        torch.save(whole.state(), tmp_path / "state.pth")
        expected = list(itertools.islice(whole, 20))
        rest = loader(three(val_fraction=FRACTION), [3, 1, 1], **settings)
        rest.resume(torch.load(tmp_path / "state.pth", weights_only=True))
        found = list(itertools.islice(rest, 20))
        assert ids(found) == ids(expected)
        assert all(
            torch.equal(a["image"], b["image"]) for a, b in zip(found, expected, strict=True)
        )
        assert rest.state() == whole.state() and rest.skip_report() == whole.skip_report()
        assert rest.skip_report()["laion"]["held_out"] > 0


def test_counts_of_older_checkpoints_are_restored(tmp_path):
    """Their rows lack the last count, "held out"."""
    make = lambda: stream([shard(tmp_path, "a", range(12))])  # noqa: E731
    whole = loader([make()])
    next(whole)
    state = whole.state()
    position, counts = state["progress"]["laion"]["workers"][0]
    assert counts[-1] == 0
    state["progress"]["laion"]["workers"][0] = [position, counts[:-1]]
    rest = loader([make()])
    rest.resume(state)
    assert ids([next(rest)]) == ids(
        [next(whole)]
    ) and rest.skip_report() == whole.skip_report() == {"laion": {"seen": 8}}
