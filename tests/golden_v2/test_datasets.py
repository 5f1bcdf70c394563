"""The newest release's datasets on made-up files: what each yields. Only the sentences of the pools are our own."""

import re
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from minigpt4.common.config_paths import PACKAGE_DIR
from minigpt4.common.config_values import overlaid
from minigpt4.common.registry import registry
from minigpt4.datasets.builders.instruction_builder import SOURCES
from minigpt4.datasets.datasets.base_dataset import SampleIndex
from minigpt4.datasets.instructions.dialogues import CONNECT
from minigpt4.datasets.instructions.pools import pool_path, read_pool
from tests.golden_v2 import needs, read
from tests.golden_v2.made_up_data import filled_in, write_data, write_refs

pytestmark = needs("f_datasets/datasets.json", "f_datasets/default_yaml.json")
FIXTURE = read("f_datasets/datasets.json", {"datasets": {}})
YAML = read("f_datasets/default_yaml.json", {})
NAMES = [name for name in FIXTURE["datasets"] if name in SOURCES and name in YAML]
EPOCHS = (
    20  # for each of an item's outcomes: one that has a share of them is then missed once in 10^8
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(FIXTURE, folder)
    return folder


def build(name, root, **changes):
    """Return the dataset of a name, its shipped YAML file changed by the fixture's paths."""
    shipped = YAML[name]["content"]["datasets"][name]
    info = overlaid(shipped["build_info"], filled_in(FIXTURE["datasets"][name]["build_info"], root))
    if "splitBy" in info:
        write_refs(
            FIXTURE, Path(info["ann_path"]), info["dataset"].removeprefix("inv"), info["splitBy"]
        )
    section = overlaid(
        shipped, {"build_info": info, **FIXTURE["processors"], "exact_boxes": True, **changes}
    )
    cls = registry.get_builder_class(name)
    assert not cls.preflight(section | {"instructions": None}, f"datasets.{name}")
    return cls(section).build_datasets()["train"]


@cache
def outcomes(name, root, index, number):
    """Return the different samples of an item, without images, in so many epochs that all `number` of them appear."""
    dataset, found = build(name, root), {}
    for epoch in range(EPOCHS * number):
        sample = dataset[SampleIndex(index, epoch)]
        texts = {
            key: value
            for key, value in sample.items()
            if key not in ("image", "images", "sample_id")
        }
        found[str(texts)] = texts
    return list(found.values())


def sample_of(known):
    """Return what the fixture says a sample holds, without its image."""
    return {key: value for key, value in known["sample"].items() if key != "image"}


def answered(sample):
    """Return the turns that have an answer; the release keeps a last question without one, and fails on it."""
    questions, answers = (sample[key].split(CONNECT) for key in ("conv_q", "conv_a"))
    return {**sample, "conv_q": CONNECT.join(questions[: len(answers)])}


def fits(structure, instruction):
    """Return whether an instruction has the fixture's structure, in which … stands for words of a pool."""
    return re.fullmatch(".+".join(map(re.escape, structure.split("…"))), instruction) is not None


@pytest.mark.parametrize("name", YAML)
def test_each_builder_has_the_yaml_file_of_the_release(name):
    file = registry.get_builder_class(name).DATASET_CONFIG_DICT["default"]
    assert file == YAML[name]["file"]
    assert OmegaConf.to_container(OmegaConf.load(PACKAGE_DIR / file)) == YAML[name]["content"]


@pytest.mark.parametrize("name", NAMES)
def test_samples(name, root):
    known = FIXTURE["datasets"][name]
    dataset = build(name, root)
    assert len(dataset) == known["length"]
    size = FIXTURE["processors"]["vis_processor"]["train"]["image_size"]
    for row in known["rows"]:
        found = outcomes(name, root, row["index"], row["number_of_distinct_outcomes"])
        assert len(found) == row["number_of_distinct_outcomes"]
        sample = dataset[row["index"]]
        images = sample["images"] if "images" in sample else [sample["image"]]
        shapes = [
            outcome["sample"]["image"]["tensor"]
            for outcome in row["outcomes"]
            if "image" in outcome["sample"]
        ]
        assert [list(image.shape) for image in images] == shapes[:1] or (not images and not shapes)
        assert not shapes or shapes[0] == [3, size, size]
        for outcome in row["outcomes"]:
            check_outcome(sample_of(outcome), found)
        if "conv_q" not in found[0]:
            assert sorted({texts["answer"] for texts in found}) == row["answers"]
            instructions = {texts["instruction_input"] for texts in found}
            assert len(instructions) == row["number_of_distinct_instructions"]
            assert all(text.startswith(row["all_instructions_start_with"]) for text in instructions)
            assert all(
                text.endswith(row.get("all_instructions_end_with", " ")) for text in instructions
            )


def check_outcome(known, found):
    """Assert that what the release yielded, the pool's sentence aside, is among what was found."""
    if "conv_q" in known:
        assert found == [answered(known)]
        return
    structure = known.pop("instruction_structure", None)
    if structure is None:
        assert known in found
        return
    alike = [
        texts
        for texts in found
        if {**texts, "instruction_input": None} == {**known, "instruction_input": None}
    ]
    assert any(fits(structure, texts["instruction_input"]) for texts in alike), structure


@pytest.mark.parametrize("name", NAMES)
def test_the_image_that_is_opened(name, root, monkeypatch):
    dataset = build(name, root)
    opened = []
    load_image = type(dataset).load_image
    monkeypatch.setattr(dataset, "load_image", lambda path: opened.append(path) or load_image(path))
    for row in FIXTURE["datasets"][name]["rows"]:
        opened.clear()
        dataset[row["index"]]
        assert [str(path.relative_to(root)) for path in opened] == row["outcomes"][0]["opened"]


@pytest.mark.parametrize("name", NAMES)
def test_the_instruction_is_a_sentence_of_the_pool_around_the_words_of_the_annotation(name, root):
    task = SOURCES[name].task
    if task.pool is None:
        assert " [" not in str(
            build(name, root)[0].get("instruction_input", "").replace("[detection]", "")
        )
        return
    pool = read_pool(pool_path(task.pool), task.takes_words)
    for row in FIXTURE["datasets"][name]["rows"]:
        used = set()
        for texts in outcomes(name, root, row["index"], row["number_of_distinct_outcomes"]):
            sentence = texts["instruction_input"].removeprefix(
                f"<Img><ImageHere></Img> {task.tag} "
            )
            used |= {line for line in pool if fits(f"{line} ".replace("{}", "…"), sentence)}
        assert used == set(pool)


@pytest.mark.parametrize("name", [name for name in NAMES if name == "refvg"])
def test_boxes_that_reach_out_of_the_image_are_cut_to_it_by_default(name, root):
    exact, cut = build(name, root), build(name, root, exact_boxes=False)
    for index in range(len(exact)):
        before, after = (re.findall(r"-?\d+", dataset[index]["answer"]) for dataset in (exact, cut))
        assert [min(max(int(number), 0), 100) for number in before] == list(map(int, after))


@needs("f_datasets/documented_layout.json")
def test_images_directly_in_the_folder_are_found_too(root):
    """The release's data guide puts them there; its own code then finds none, and says nothing."""
    layout = read("f_datasets/documented_layout.json")
    for path in (root / "coco/train").iterdir():
        path.rename(root / "coco" / path.name)
    (root / "coco/train").rmdir()
    for name in layout["results"]:
        dataset = build(name, root)
        assert len(dataset) == FIXTURE["datasets"][name]["length"]
        assert "image" in dataset[0]
