"""MiniGPT-v2's instruction datasets in training: mixing, resuming, ranks, splits, pools, images, text alone."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from minigpt4.common.registry import registry
from minigpt4.datasets.builders.instruction_builder import SOURCES
from minigpt4.datasets.datasets.base_dataset import Place, SampleIndex
from minigpt4.datasets.datasets.map_style import adapted
from minigpt4.datasets.datasets.skips import DataError
from minigpt4.processors import Blip2ImageEvalProcessor
from tests.datasets.instruction_files import (
    CAPTIONS,
    IDS,
    INSTANCES,
    QUESTIONS,
    SIZE,
    build,
    name_of,
    preflight,
    section,
    write_all,
    write_images,
    write_json,
    write_refs,
)
from tests.datasets.shards import ids, loader

# batch_size and sample_ratio of the release's training file
MIX = json.loads((Path(__file__).parents[1] / "golden_v2/data/j_configs/merged.json").read_text())
MIX = MIX["configs"]["train_configs/minigptv2_finetune.yaml"]["datasets"]


@pytest.fixture(scope="module")
def infos(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("v2"))


@pytest.fixture
def mix(infos):
    """Return a function that builds all 22 datasets, with the release's ratios and batch sizes."""

    def make(names=tuple(MIX)):
        numbers = {
            name: {key: MIX[name][key] for key in ("sample_ratio", "batch_size")} for name in names
        }
        return [build(name, infos[name], **numbers[name])["train"] for name in names]

    return make


def take(batches, number):
    return list(itertools.islice(batches, number))


def texts(batches):
    """Return batches without their images."""
    left_out = ("image", "normalise", "image_id")
    return [
        {key: value for key, value in batch.items() if key not in left_out} for batch in batches
    ]


def test_the_release_trains_on_these(mix):
    assert set(MIX) == set(SOURCES)
    assert [dataset.name for dataset in mix()] == list(MIX)


def test_batches_have_the_sizes_of_the_yaml_file_and_hold_what_the_model_reads(mix):
    batches = take(loader(mix(), batch_size=99, seed=1), 80)
    seen = set()
    for batch in batches:
        name = batch["sample_id"][0].partition("/")[0]
        size = MIX[name]["batch_size"]
        seen.add(name)
        assert {sample_id.partition("/")[0] for sample_id in batch["sample_id"]} == {name}
        keys = (
            ("conv_q", "conv_a", "connect_sym")
            if "conversation" in name
            else ("instruction_input", "answer")
        )
        for key in keys:
            assert len(batch[key]) == size and all(isinstance(text, str) for text in batch[key])
        if name == "unnatural_instruction":
            assert batch["num_images"] == [0] * size and batch["image"].shape == (0, 3, 0, 0)
        else:
            assert batch["image"].shape[0] == size and "num_images" not in batch
    assert len(seen) > 15  # the rarest have a share of 1 in 100


def test_the_share_of_each_dataset_is_its_ratio(mix):
    total = sum(section["sample_ratio"] for section in MIX.values())
    expected = [section["sample_ratio"] / total for section in MIX.values()]
    assert loader(mix()).ratios.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_mix_resumes_exactly_in_mid_epoch(mix, tmp_path, num_workers):
    names = ("unnatural_instruction", "coco_vqa", "refcoco", "llava_conversation")
    settings = {"num_workers": num_workers, "seed": 4, "batch_size": 3}
    whole = loader(mix(names), **settings)
    take(whole, 5)
    torch.save(whole.state(), tmp_path / "state.pth")
    expected = take(whole, 12)
    rest = loader(mix(names), **settings)
    rest.resume(torch.load(tmp_path / "state.pth", weights_only=True))
    found = take(rest, 12)
    assert texts(found) == texts(expected)
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(found, expected, strict=True))
    assert rest.state() == whole.state()


def test_two_ranks_share_the_records_of_an_epoch(mix):
    found = []
    for rank in range(2):
        batches = loader(mix(["refcocog"]), seed=5, rank=rank, world_size=2)
        while len(ids(found)) < len(IDS) * (rank + 1) // 2:
            found.append(next(batches))
            found[-1]["sample_id"] = found[-1]["sample_id"][: len(IDS) // 2]
    assert sorted(ids(found)) == sorted(
        f"refcocog/refs(umd).p record {number}" for number in range(len(IDS))
    )


def test_random_choices_depend_only_on_seed_epoch_and_record(infos):
    first, other = (build("coco_vqa", infos["coco_vqa"])["train"] for _ in range(2))
    other[3]
    drawn = [first[SampleIndex(0, epoch)]["answer"] for epoch in range(20)]
    assert drawn == [other[SampleIndex(0, epoch)]["answer"] for epoch in range(20)]
    assert set(drawn) == {"red", "blue"}
    other.bind(Place(seed=1))
    assert drawn != [other[SampleIndex(0, epoch)]["answer"] for epoch in range(20)]


def test_a_validation_split_has_other_images_than_training(infos):
    splits = build("refcoco", infos["refcoco"], val_fraction=0.5)
    held = [{record.image for record in splits[split].annotation} for split in ("train", "val")]
    assert all(held) and not held[0] & held[1]
    assert len(held[0] | held[1]) == len(IDS)


def test_the_files_of_a_dataset_and_of_its_inverse_are_read_once(infos):
    a, b = (build(name, infos[name])["train"] for name in ("refcoco", "invrefcoco"))
    assert a.annotation is b.annotation and a.fingerprint == b.fingerprint
    assert (
        a.fingerprint != build("refcoco", infos["refcoco"], val_fraction=0.5)["train"].fingerprint
    )
    assert (a[0]["answer"], b[0]["answer"]) == ("{<10><10><30><30>}", "boat 1")


def test_images_are_not_cropped_even_by_the_training_processor(infos):
    """A crop would make boxes wrong; in MiniGPT-v2's release, the processor of this name does not crop."""
    dataset = build("refcoco", infos["refcoco"])["train"]
    assert isinstance(dataset.vis_processor, Blip2ImageEvalProcessor)
    assert torch.equal(dataset[0]["image"], dataset[SampleIndex(0, 7)]["image"])


# what is missing


def test_missing_images_are_counted(tmp_path):
    write_images(tmp_path / "coco", [name_of(1), name_of(2)])
    write_refs(tmp_path)
    dataset = build(
        "refcoco", {"ann_path": str(tmp_path), "image_path": str(tmp_path / "coco")} | REFCOCO
    )["train"]
    taken = [dataset[index]["image_id"] for index in range(len(dataset))]
    assert set(taken) == {1, 2}
    report = dataset.skips.report()
    assert report["missing_file"] == report["seen"] - len(IDS) > 0


REFCOCO = {"dataset": "refcoco", "splitBy": "unc"}


def test_questions_about_missing_images_are_left_out_and_reported(tmp_path, caplog):
    """The release's vqa_val.json is about COCO's val2014, which its folder layout does not contain."""
    write_images(tmp_path / "coco/train", [name_of(1), name_of(2)])
    path = write_json(tmp_path / "vqa.json", QUESTIONS)
    info = {
        "annotations": {"train": {"storage": str(path)}},
        "images": {"storage": str(tmp_path / "coco")},
    }
    dataset = build("coco_vqa", info)["train"]
    assert len(dataset) == 2
    expected = f"coco_vqa: 6 of 8 records are about images that are not in '{tmp_path}/coco/train' or '{tmp_path}/coco'"
    assert f"{expected}; they are left out" in caplog.text
    dataset[0], dataset[1]
    assert dataset.skips.report() == {"seen": 2}


def test_too_many_missing_images_end_the_run(tmp_path):
    write_images(tmp_path / "coco", [name_of(1)])
    write_refs(tmp_path)
    info = {"ann_path": str(tmp_path), "image_path": str(tmp_path / "coco")} | REFCOCO
    batches = loader([build("refcoco", info)["train"]], max_bad_fraction=0.5)
    with pytest.raises(
        DataError, match=r"refcoco: .* of 1000 samples were unusable .*: .* missing_file"
    ):
        take(batches, 400)


def test_a_broken_record_affects_only_itself(tmp_path, caplog):
    write_images(tmp_path / "coco")
    path = write_json(
        tmp_path / "c.json", [*CAPTIONS, {"image": f"train2014/{name_of(1)}", "caption": None}]
    )
    info = {
        "annotations": {"train": {"storage": [str(path)]}},
        "images": {"storage": str(tmp_path / "coco")},
    }
    dataset = build("coco_caption", info)["train"]
    assert len(dataset) == len(IDS) + 1
    assert (
        "1 of 9 records cannot be used; first: c.json record 8: bad_record ('caption' is NoneType, not text)"
        in (caplog.text)
    )


# boxes


def boxes(tmp_path, box, size=SIZE, **more):
    """Return the answers to a single ref with this box; the image has SIZE, its annotation says `size`."""
    write_images(tmp_path / "coco", [name_of(1)])
    images = [{"id": 1, "width": size[0], "height": size[1]}] if size else [{"id": 1}]
    instances = {"images": images, "annotations": [{"id": 10, "image_id": 1, "bbox": box}]}
    write_refs(tmp_path, [{"ann_id": 10, "image_id": 1, "sentences": [{"raw": "it"}]}], instances)
    info = {"ann_path": str(tmp_path), "image_path": str(tmp_path / "coco")} | REFCOCO
    return build("refcoco", info, **more)["train"]


@pytest.mark.parametrize(
    ("box", "cut", "exact"),
    [
        ([0, 0, 64, 48], "{<0><0><100><100>}", "{<0><0><100><100>}"),
        ([-6.4, 24, 70.4, 36], "{<0><50><100><100>}", "{<-10><50><100><125>}"),
        ([63.99, 47.99, 5, 5], "{<99><99><100><100>}", "{<99><99><107><110>}"),
        # 18.56 / 64 * 100 is 28.99..: truncated
        ([18.56, 0, 0.01, 1], "{<28><0><29><2>}", "{<28><0><29><2>}"),
    ],
)
def test_boxes_in_hundredths(tmp_path, box, cut, exact):
    assert boxes(tmp_path, box)[0]["answer"] == cut
    assert boxes(tmp_path, box, exact_boxes=True)[0]["answer"] == exact


@pytest.mark.parametrize(
    ("box", "size", "message"),
    [
        ([70, 0, 5, 5], SIZE, "the box [70, 0, 5, 5] lies outside of the image of 64x48 pixels"),
        ([-5, 0, 5, 5], None, "the box [-5, 0, 5, 5] lies outside of the image of 64x48 pixels"),
        (
            [1, 1, 5, 5],
            (640, 480),
            "the image has 64x48 pixels, its annotation 640x480: its box would be wrong; use the original images",
        ),
    ],
)
def test_an_invalid_box_is_skipped(tmp_path, box, size, message):
    with pytest.raises(DataError) as error:
        boxes(tmp_path, box, size)[0]
    assert message in str(error.value)


# pools


def test_a_users_own_pool(infos, tmp_path):
    (tmp_path / "mine.txt").write_text("Wo ist {} ?\n\n  Zeig mir {}\n", encoding="utf-8")
    dataset = build("refcoco", infos["refcoco"], instructions=str(tmp_path / "mine.txt"))["train"]
    asked = {dataset[SampleIndex(0, epoch)]["instruction_input"] for epoch in range(20)}
    slot = "<Img><ImageHere></Img> [refer]"
    assert asked == {f"{slot} Wo ist boat 1 ? ", f"{slot} Zeig mir boat 1 "}


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        (
            "refcoco",
            "Where is it?",
            "line 1 has 0 {}; expected one, where the words go: 'Where is it?'",
        ),
        ("coco_caption", "Say:\nWhat is {}?", "line 2 has 1 {}; expected none: 'What is {}?'"),
        (
            "gqa",
            "[vqa] {}",
            "line 1 begins with a task identifier; the dataset writes it: '[vqa] {}'",
        ),
        (
            "gqa",
            "<ImageHere> {}",
            "line 1 has <ImageHere>; the dataset writes the image before the line: ",
        ),
        ("gqa", "\n \n", "has no line; expected one instruction a line"),
    ],
)
def test_an_invalid_pool(infos, tmp_path, name, lines, message):
    path = tmp_path / "pool.txt"
    path.write_text(lines)
    (found,) = preflight(name, infos[name], instructions=str(path))
    assert found.startswith(f"datasets.{name}.instructions: '{path}' {message}")


def test_a_pool_for_a_conversation_and_a_missing_pool(infos):
    (found,) = preflight("llava_conversation", infos["llava_conversation"], instructions="x.txt")
    assert found == (
        "datasets.llava_conversation.instructions: a conversation has its own questions; remove the key"
    )
    (found,) = preflight("refcoco", infos["refcoco"], instructions="/nowhere/x.txt")
    assert (
        found
        == "datasets.refcoco.instructions: no file at '/nowhere/x.txt'; expected one instruction a line"
    )


# users' own datasets with the sample keys of MiniGPT-v2


class Written:
    """A map-style dataset as users write it for MiniGPT-v2's release."""

    def __init__(self, *samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return dict(self.samples[index])


def test_samples_with_the_keys_of_the_newest_release_train_as_they_are():
    image = torch.zeros(3, 8, 8)
    dataset = adapted(
        Written(
            {
                "image": image,
                "instruction_input": "<Img><ImageHere></Img> [vqa] what? ",
                "answer": "a dog",
            },
            {
                "image": image,
                "conv_q": "<Img><ImageHere></Img> a !@#b ",
                "conv_a": "c!@#d",
                "connect_sym": "!@#",
            },
            {"instruction_input": "say it", "answer": "it"},
        ),
        "own",
    )
    batch = next(loader([dataset], batch_size=3))
    assert sorted(batch["num_images"]) == [0, 1, 1]
    assert batch["image"].shape == (2, 3, 8, 8)
    assert sorted(map(bool, batch["answer"])) == [False, True, True]
    empty = adapted(
        Written({"image": image, "answer": "a"}, {"image": image, "answer": " "}), "own"
    )
    empty[1]
    assert empty.skips.report() == {"seen": 2, "bad_caption": 1}


def test_every_builder_has_a_section_that_passes(infos):
    for name, info in infos.items():
        assert preflight(name, info) == []
        builder = registry.get_builder_class(name)(section(info))
        dataset = builder.build_datasets()["train"]
        assert len(dataset) == len(IDS)
        assert [
            sample["sample_id"] for sample in dataset.one_pass()
        ] and dataset.skips.report() == {"seen": len(IDS)}
    assert INSTANCES["images"] and set(infos) == set(SOURCES)
