"""Datasets written for the 2023 release, or plain torch datasets, work in training like the package's own."""

import itertools
import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from minigpt4.common.config import Problem
from minigpt4.common.registry import registry
from minigpt4.datasets.builders import BaseDatasetBuilder
from minigpt4.datasets.builders.own_data_builder import OwnDataBuilder
from minigpt4.datasets.datasets.annotations import Fault, Record
from minigpt4.datasets.datasets.base_dataset import BaseDataset, Place, SampleIndex
from minigpt4.datasets.datasets.caption_datasets import CaptionDataset
from minigpt4.datasets.datasets.dataloader_utils import EvalLoader
from minigpt4.datasets.datasets.map_style import adapted
from minigpt4.datasets.datasets.skips import DataError
from minigpt4.processors import Blip2ImageTrainProcessor, ImageError
from minigpt4.tasks import ImageTextPretrainTask
from minigpt4.text.segments import IMAGE
from tests.datasets.shards import ids, jpeg, loader
from tests.datasets.test_builders import section


class Plain(Dataset):
    """The minimum that torch requires; image_id is text."""

    def __init__(self, vis_processor, text_processor, vis_root, ann_paths):
        self.vis_processor, self.text_processor, self.vis_root = (
            vis_processor,
            text_processor,
            vis_root,
        )
        self.annotation = json.loads(Path(ann_paths[0]).read_text())["annotations"]

    def __len__(self):
        return len(self.annotation)

    def __getitem__(self, index):
        record = self.annotation[index]
        image = Image.open(Path(self.vis_root) / f"{record['image_id']}.jpg").convert("RGB")
        return {
            "image": self.vis_processor(image),
            "text_input": record["caption"],
            "image_id": record["image_id"],
        }


class Based(BaseDataset):
    def __init__(self, vis_processor, text_processor, vis_root, ann_paths):
        super().__init__(vis_processor, text_processor, vis_root, ann_paths)

    __len__, __getitem__ = Plain.__len__, Plain.__getitem__


class Captions(CaptionDataset):
    def __getitem__(self, index):
        return Plain.__getitem__(self, index) | {
            "image_id": self.img_ids[self.annotation[index]["image_id"]]
        }


class Changed(CaptionDataset):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return sample | {"text_input": sample["text_input"].upper()}


pytestmark = pytest.mark.usefixtures("own_code")  # undoes registrations
STYLES = (Plain, Based, Captions, Changed)


class Builder(BaseDatasetBuilder):
    """As in 2023: `build_datasets` makes all splits, under names of its own."""

    def build_datasets(self):
        self.build_processors()
        folder = Path(self.config["build_info"]["storage"])
        vis, text = self.vis_processors["train"], self.text_processors["train"]
        make = self.style(
            vis_processor=vis,
            text_processor=text,
            vis_root=str(folder),
            ann_paths=[folder / "c.json"],
        )
        return {"train": make, "valid": make}


@pytest.fixture
def folder(tmp_path):
    records = [{"image_id": name, "caption": f"Caption {name} \ud83d."} for name in "abcdef"]
    for number, record in enumerate(records):
        (tmp_path / f"{record['image_id']}.jpg").write_bytes(jpeg(number))
    (tmp_path / "c.json").write_text(json.dumps({"annotations": records}))
    return tmp_path


def built(style, folder, **more):
    """Return {split: dataset} as the task builds them from a section "xrays"."""
    registry.register_builder("xrays")(Builder)
    Builder.style = style
    cfg = section("xrays", str(folder), **more)
    cfg = SimpleNamespace(
        datasets_cfg={"xrays": cfg}, run_cfg=SimpleNamespace(iters_per_epoch=None, evaluate=False)
    )
    return ImageTextPretrainTask().build_datasets(cfg)["xrays"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_dataset_of_2023_gives_each_sample_once_per_epoch(folder, style, num_workers):
    batches = loader([built(style, folder)["train"]], batch_size=3, num_workers=num_workers)
    first = list(itertools.islice(batches, 2))
    assert (
        sorted(itertools.chain.from_iterable(batch["text_input"] for batch in first))[0].upper()
        == "CAPTION A \ufffd."
    )
    assert len(set(ids(first))) == 6 and all(name.startswith("xrays/") for name in ids(first))
    assert first[0]["image"].shape[0] == 3 and len(first[0]["image_id"]) == 3
    assert batches.skip_report() == {"xrays": {"seen": 6}}
    batches.close()


@pytest.mark.parametrize("style", STYLES)
def test_its_augmentation_is_seeded_by_the_run_and_differs_between_epochs(folder, style):
    epochs = []
    for seed in (3, 3):
        batches = loader([built(style, folder)["train"]], batch_size=6, seed=seed)
        for batch in itertools.islice(batches, 2):
            order = sorted(range(6), key=ids([batch]).__getitem__)
            epochs.append(batch["image"][order])
    assert torch.equal(epochs[0], epochs[2]) and torch.equal(epochs[1], epochs[3])
    assert not torch.equal(epochs[0], epochs[1])


def test_it_resumes_exactly(folder):
    whole = loader([built(Plain, folder)["train"]], batch_size=2)
    before, state = [next(whole), next(whole)], whole.state()
    after = list(itertools.islice(whole, 3))
    again = loader([built(Plain, folder)["train"]], batch_size=2)
    again.resume(pickle.loads(pickle.dumps(state)))
    for batch in after:
        found = next(again)
        assert found["sample_id"] == batch["sample_id"] and torch.equal(
            found["image"], batch["image"]
        )
    assert len(before) == 2


def test_its_ratio_its_samples_and_its_broken_images(folder):
    (folder / "b.jpg").write_bytes(b"broken")
    (folder / "c.jpg").unlink()
    dataset = built(Plain, folder, sample_ratio=7, batch_size=5)["train"]
    assert (dataset.sample_ratio, dataset.batch_size, len(dataset.listing())) == (7, 5, 6)
    samples = list(dataset.one_pass())
    assert [
        sample["text_input"][8] for sample in sorted(samples, key=lambda s: s["text_input"])
    ] == list("adef")
    assert dataset.skips.report() == {"seen": 6, "bad_image": 2}
    assert dataset.vis_processor.to_image(samples[0]["image"]).size == (8, 8)
    for name in "adef":
        (folder / f"{name}.jpg").unlink()
    with pytest.raises(DataError, match="6 bad_image"):
        next(loader([dataset]))
    with pytest.raises(
        ValueError,
        match=r"xrays: .*Plain gives no usable sample, 6 were tried; the first: bad_image",
    ):
        built(Plain, folder)


def test_its_own_ratio_holds_unless_the_section_has_one(folder, monkeypatch):
    monkeypatch.setattr(Plain, "sample_ratio", 3, raising=False)
    monkeypatch.setattr(Plain, "batch_size", "its own business", raising=False)
    found = [built(Plain, folder)["train"], built(Plain, folder, sample_ratio=7)["train"]]
    assert [(each.sample_ratio, each.batch_size) for each in found] == [(3, None), (7, None)]
    # also where the base builder makes the splits
    own = {"build_train_dataset": lambda self, storage: Builder.build_datasets(self)["train"]}
    cls = type("Own", (Builder,), own | {"build_datasets": BaseDatasetBuilder.build_datasets})
    builder = cls(section("xrays", str(folder)), "xrays")
    assert builder.build_datasets()["train"].sample_ratio == 3


@pytest.mark.parametrize("style", [*STYLES, CaptionDataset])
def test_each_sample_of_its_own_validation_split_comes_once(folder, style):
    splits = built(style, folder)
    (folder / "b.jpg").write_bytes(b"broken")
    found = ids(EvalLoader(splits["valid"], Place(), 4, num_workers=0, max_bad=1.0))
    assert len(found) == len(set(found)) == 5
    assert len(ids(itertools.islice(loader([splits["train"]], batch_size=6), 1))) == 6


@pytest.mark.parametrize("word", ["val", "eval", "valid", "validation"])
def test_all_names_of_the_validation_split_are_accepted(folder, word):
    settings = {
        "batch_size_eval": 4,
        "num_workers": 0,
        "max_bad_fraction": 0.1,
        "eval_controls": True,
    }
    run_cfg = SimpleNamespace(seed=1, **settings)
    (found,) = ImageTextPretrainTask().build_eval_loaders(
        {"xrays": built(Plain, folder)}, run_cfg, [word]
    )[word]
    assert isinstance(found, EvalLoader) and len(ids(found)) == 6
    with pytest.raises(ValueError, match="no dataset has a split 'test'"):
        ImageTextPretrainTask().build_eval_loaders(
            {"xrays": built(Plain, folder)}, run_cfg, ["test"]
        )


def test_the_base_builder_takes_it_with_a_validation_split(folder):
    @registry.register_builder("own")
    class Own(BaseDatasetBuilder):
        def build_train_dataset(self, storage):
            return Plain(self.vis_processors["train"], None, storage, [Path(storage) / "c.json"])

    cfg = section("own", str(folder), val_fraction=0.5)
    splits = Own(cfg, "own").build_datasets()
    assert len(splits["train"]) + len(splits["val"]) == 6 and len(splits["val"])
    first = splits["val"][0]
    assert torch.equal(first["image"], splits["val"][0]["image"]) and splits["val"].is_val


class Stream(IterableDataset):
    def __iter__(self):
        yield {}


GOOD = {"image": torch.zeros(3, 8, 8), "text_input": "A dog."}
TURNS = {"image": GOOD["image"], "turns": [["Which \ud83d?", "A cat."]]}


class Listed(Dataset):
    """Returns the given samples; one that is an exception is raised."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        if isinstance(sample := self.samples[index], Exception):
            raise sample
        return sample


@pytest.mark.parametrize(
    ("sample", "reason", "detail"),
    [
        (None, "bad_record", "the sample is NoneType, not a mapping"),
        ((GOOD["image"], "A dog."), "bad_record", "the sample is tuple, not a mapping"),
        ({"text_input": "A dog."}, "no_image", "'image' is missing (keys: text_input)"),
        (
            GOOD | {"image": Image.new("RGB", (8, 8))},
            "bad_image",
            "the image is Image; expected a tensor [3, S, S]",
        ),
        (
            GOOD | {"image": torch.zeros(1, 8, 8)},
            "bad_image",
            "the image is [1, 8, 8]; expected a tensor [3, S, S]",
        ),
        (
            GOOD | {"image": torch.zeros(8, 8, 3)},
            "bad_image",
            "the image is [8, 8, 3]; expected a tensor [3, S, S]",
        ),
        (
            GOOD | {"images": [GOOD["image"], torch.zeros(3, 9, 9)]},
            "bad_image",
            "the image is [3, 9, 9], the first one [3, 8, 8]",
        ),
        (
            GOOD | {"image": torch.zeros(3, 9, 9)},
            "bad_image",
            "the image is [3, 9, 9], the first one [3, 8, 8]",
        ),
        (
            {"image": GOOD["image"], "caption": "A dog."},
            "bad_caption",
            "'text_input' is missing (keys: image, caption)",
        ),
        (GOOD | {"text_input": None}, "bad_caption", "'text_input' is NoneType, not text"),
        (GOOD | {"text_input": " \n"}, "bad_caption", "'text_input' is empty"),
        (GOOD | {"instruction": 5}, "bad_caption", "'instruction' is int, not text"),
        (GOOD | {"images": 5}, "bad_image", "'images' is int; expected a list of tensors"),
        (TURNS | {"turns": "ab"}, "bad_caption", "'turns' is str, not a list of pairs"),
        (
            TURNS | {"turns": [{"question": "Which?", "answer": "Red."}]},
            "bad_caption",
            "turn 0 is {'question': 'Which?', 'answer': 'Red.'}; expected (question, answer)",
        ),
        (
            TURNS | {"turns": [("a", "b"), ("a", "b", "c")]},
            "bad_caption",
            "turn 1 is ('a', 'b', 'c",
        ),
        (TURNS | {"turns": [("a", "b"), ("c", None)]}, "bad_caption", "turn 1 is ('c', None); exp"),
        (TURNS | {"turns": [("a", "b"), ("c", " ")]}, "bad_caption", "turn 1 is ('c', ' '); exp"),
        (TURNS | {"turns": [(5, "b")]}, "bad_caption", "turn 0 is (5, 'b'); expected"),
        (KeyError("caption"), "bad_record", "KeyError: 'caption' (test_map_style.py line "),
        (ImageError("cut off"), "bad_image", "ImageError: cut off (test_map_style.py line "),
    ],
)
def test_a_malformed_sample_is_counted_and_a_dataset_of_them_is_rejected(
    sample, reason, detail, caplog
):
    dataset = adapted(Listed([GOOD, sample, TURNS]), "xrays")
    used = sorted(sample["text_input"] for sample in dataset.one_pass())
    assert used == ["A cat.", "A dog."] and dataset.skips.report() == {"seen": 3, reason: 1}
    assert f"skipped record 1: {reason} ({detail}" in caplog.text
    if "the first one" not in detail:
        with pytest.raises(
            ValueError, match=re.escape(f"2 were tried; the first: {reason} ({detail}")
        ):
            adapted(Listed([sample, sample]), "xrays")


def test_turns_alone_are_enough_and_lone_surrogates_are_replaced():
    batch = next(loader([adapted(Listed([TURNS]), "xrays")], batch_size=1))
    assert batch["text_input"] == ["A cat."] and batch["turns"] == [(("Which \ufffd?", "A cat."),)]


def test_questions_may_be_of_texts_and_images_and_images_may_be_none():
    question = ["Compare", IMAGE, "with", IMAGE]
    samples = [
        {"images": [GOOD["image"]] * 2, "turns": [(question, "Equal.")]},
        GOOD | {"images": None, "instruction": None},
    ]
    first, second = adapted(Listed(samples), "xrays")
    assert first["turns"] == ((question, "Equal."),)
    assert (second["text_input"], "images" in second) == ("A dog.", False)


def test_images_may_be_bytes_as_for_the_device():
    sample = GOOD | {"image": torch.zeros(8, 8, 3, dtype=torch.uint8), "normalise": str}
    assert adapted(Listed([sample]), "xrays")[0]["image"].shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("dataset", "detail"),
    [
        (Stream(), "Stream has no __len__"),
        (BaseDataset(), "BaseDataset has no"),
        (None, "NoneType has no"),
    ],
)
def test_datasets_that_cannot_be_adapted_are_rejected_by_name(dataset, detail):
    with pytest.raises(ValueError, match=r"^datasets\.xrays: .*Listed is empty"):
        adapted(Listed([]), "xrays")
    with pytest.raises(
        ValueError, match=rf"^datasets\.xrays: .*{detail}.*a dataset needs __len__ and __getitem__"
    ):
        adapted(dataset, "xrays")


def test_a_sample_index_carries_its_epoch():
    index = pickle.loads(pickle.dumps(SampleIndex(7, 3)))
    assert (index, index.epoch, [0] * 8)[2][index] == 0 and (index, index.epoch) == (7, 3)
    assert "abcdefgh"[index] == "h" and Place().seed == 0


# a builder of records


def test_a_subclass_of_the_own_data_builder_needs_only_records(tmp_path):
    @registry.register_builder("titles")
    class Titles(OwnDataBuilder):
        """Images named by their captions."""

        @classmethod
        def records(cls, info):
            folder = Path(info["storage"])
            next(folder.iterdir())
            return [
                Record(path.name, path.name, path.stem) for path in sorted(folder.iterdir())
            ], folder

    where = "datasets.titles"
    assert Titles.preflight(section("titles", str(tmp_path / "none")), where) == [
        Problem(f"{where}.build_info.storage", f"nothing at '{tmp_path}/none'")
    ]
    (tmp_path / "A dog.jpg").write_bytes(jpeg(0))
    cfg = section("titles", str(tmp_path))
    assert Titles.preflight(cfg, where) == []
    assert Titles(cfg, "titles").build_datasets()["train"][0]["text_input"] == "A dog"


@pytest.mark.parametrize("records", [[], [Fault("b", "bad_record", "")]])
def test_a_builder_without_a_usable_record_is_refused(records, tmp_path):
    @registry.register_builder("titles")
    class Titles(OwnDataBuilder):
        @classmethod
        def records(cls, info):
            return records, Path(info["storage"])

    cfg = section("titles", str(tmp_path))
    assert Titles.preflight(cfg, "datasets.titles") == [
        Problem(
            "datasets.titles.build_info.storage",
            f"none of {len(records)} records can be used; expected images with texts in '{tmp_path}'",
        )
    ]
    if not records:
        with pytest.raises(ValueError, match=r"^datasets\.titles: .*ImageTextDataset is empty$"):
            Titles(cfg, "titles").build_datasets()


def test_records_must_be_a_class_method():
    with pytest.raises(TypeError, match=r"Titles\.records: write @classmethod above it"):

        class Titles(OwnDataBuilder):
            def records(self, info):
                return [], Path()


def test_the_processor_of_these_tests_is_random(folder):
    assert isinstance(built(Plain, folder)["train"].vis_processor, Blip2ImageTrainProcessor)
