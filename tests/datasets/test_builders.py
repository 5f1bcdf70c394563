"""Builders: from sections of the configuration to datasets, and the messages for wrong sections before loading."""

import pytest
from omegaconf import OmegaConf

from minigpt4.common.config import Problem
from minigpt4.common.registry import registry
from minigpt4.datasets.datasets.shard_list import ACCEPTED
from minigpt4.processors import BlipCaptionProcessor
from tests.datasets.shards import folder_dataset, shard

TRAIN = {"name": "blip2_image_train", "image_size": 8}


def section(name, storage, **more):
    """Return the typed section of a dataset, as a Config contains it."""
    cls = registry.get_builder_class(name)
    own = {"build_info": {"storage": storage}, "vis_processor": {"train": TRAIN}, **more}
    return OmegaConf.merge(OmegaConf.structured(cls.Config), own)


def preflight(name, storage, **more):
    """Return the problems of a section, as a user reads them."""
    cls = registry.get_builder_class(name)
    return list(map(str, cls.preflight(section(name, storage, **more), f"datasets.{name}")))


@pytest.mark.parametrize("name", ["laion", "cc_sbu"])
def test_shard_builders(tmp_path, name):
    shard(tmp_path, "00000", range(3))
    cfg = section(
        name,
        f"{tmp_path}/{{00000..00000}}.tar",
        text_processor={"train": {"name": "blip_caption"}},
        sample_ratio=14,
        batch_size=2,
    )
    dataset = registry.get_builder_class(name)(cfg).build_datasets()["train"]
    assert (dataset.name, dataset.sample_ratio, dataset.batch_size) == (name, 14, 2)
    assert next(iter(dataset))["text_input"].startswith("caption ")
    assert registry.get_builder_class(name).preflight(cfg, f"datasets.{name}") == []


def test_without_a_text_processor_the_caption_is_raw(tmp_path):
    builder = registry.get_builder_class("laion")(section("laion", shard(tmp_path, "0", range(3))))
    dataset = builder.build_datasets()["train"]
    assert next(iter(dataset))["text_input"].startswith("Caption ")
    assert builder.text_processors["eval"]("As IT is.") == "As IT is."
    assert builder.vis_processors["eval"] is None


def test_the_align_builder_ignores_the_text_processor(tmp_path):
    folder_dataset(tmp_path, range(3))
    cfg = section("cc_sbu_align", str(tmp_path), text_processor={"train": {"name": "blip_caption"}})
    builder = registry.get_builder_class("cc_sbu_align")(cfg)
    assert builder.build_datasets()["train"][2]["text_input"] == "Caption 2."
    assert isinstance(builder.text_processors["train"], BlipCaptionProcessor)
    assert preflight("cc_sbu_align", str(tmp_path)) == []


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        (
            "{tmp}/x/{{00000..00002}}.tar",
            "no file matches '{storage}' (first missing: {tmp}/x/00000.tar)",
        ),
        (
            "{tmp}/{{00000..00002}}.tar",
            "2 of 3 shards are missing (first missing: {tmp}/00001.tar)",
        ),
        ("{tmp}/*.zip", "no file matches '{storage}'"),
        ("pipe:cat a.tar", f"'pipe:cat a.tar': 'pipe:' is refused; shards are {ACCEPTED}"),
        ([], "no file matches '[]'"),
        (7, "7 is no path of a shard; expected text"),
    ],
)
def test_preflight_finds_missing_shards(tmp_path, storage, message):
    shard(tmp_path, "00000", [])
    storage = storage.format(tmp=tmp_path) if isinstance(storage, str) else storage
    expected = message.format(tmp=tmp_path, storage=storage)
    assert preflight("laion", storage) == [f"datasets.laion.build_info.storage: {expected}"]


def test_preflight_accepts_urls_unseen():
    assert preflight("laion", "https://example.org/{00000..10488}.tar") == []


def test_preflight_finds_what_is_missing_in_the_align_folder(tmp_path):
    key = "datasets.cc_sbu_align.build_info.storage"
    assert preflight("cc_sbu_align", f"{tmp_path}/none") == [
        f"{key}: no folder at '{tmp_path}/none'; expected one with filter_cap.json and image/"
    ]
    assert preflight("cc_sbu_align", str(tmp_path)) == [
        f"{key}: '{tmp_path}' has no filter_cap.json",
        f"{key}: '{tmp_path}' has no folder image/",
    ]
    folder_dataset(tmp_path, [0])
    (tmp_path / "filter_cap.json").write_text('{"annotations": [{"image_id": 0}]}')
    assert preflight("cc_sbu_align", str(tmp_path)) == [
        f"{key}: {tmp_path}/filter_cap.json: record 0: 'caption' is None; expected text"
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"vis_processor": {"train": None}},
            "vis_processor.train: missing; name an image processor, e.g. {name: blip2_image_train, image_size: 224}",
        ),
        (
            {"vis_processor": {"train": TRAIN | {"image_size": 0}}},
            "vis_processor.train: image_size: 0; expected at least 1 pixel",
        ),
        (
            {"vis_processor": {"train": TRAIN | {"min_scale": 0.9, "max_scale": 0.5}}},
            "vis_processor.train: min_scale 0.9, max_scale 0.5: expected 0 < min_scale <= max_scale",
        ),
        (
            {"vis_processor": {"train": TRAIN | {"mean": [0.5]}}},
            "vis_processor.train: mean [0.5], std [0.26862954, 0.26130258, 0.27577711]: expected three numbers each "
            "(R, G, B), std above 0",
        ),
        (
            {"text_processor": {"train": {"name": "blip_caption", "max_words": 0}}},
            "text_processor.train: max_words: 0; expected at least 1",
        ),
        ({"sample_ratio": -1}, "sample_ratio: -1.0; expected a number above 0"),
        ({"batch_size": 0}, "batch_size: 0; expected an integer above 0"),
    ],
)
def test_preflight_finds_wrong_settings(tmp_path, settings, message):
    location = shard(tmp_path, "0", [])
    if "vis_processor" in settings and settings["vis_processor"]["train"] is None:
        cfg = section("laion", location)
        cfg.vis_processor.train = None
        (problem,) = registry.get_builder_class("laion").preflight(cfg, "datasets.laion")
        key, _, words = message.partition(": ")
        assert problem == Problem(f"datasets.laion.{key}", words)
    else:
        assert preflight("laion", location, **settings) == [f"datasets.laion.{message}"]
