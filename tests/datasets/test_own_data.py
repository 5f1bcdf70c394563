"""Users' own images with captions or conversations: formats, and the key `builder`."""

import json
from argparse import Namespace

import pytest

from minigpt4.common.config import Config, ConfigError
from minigpt4.common.registry import registry
from minigpt4.datasets.datasets.annotations import read_records
from minigpt4.datasets.datasets.image_text_dataset import read_folder
from tests.datasets.shards import jpeg, loader, pair, shard, write_tar
from tests.datasets.test_builders import section

TURNS = (("What is it?", "A dog."), ("Which colour?", "Brown."))
LLAVA = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A dog."},
    {"from": "human", "value": "Which colour?"},
    {"from": "gpt", "value": "Brown."},
]


def write_images(folder, *names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))


def build(builder, storage, name="own", **build_info):
    cfg = section(builder, str(storage))
    cfg.build_info.update(build_info)
    return registry.get_builder_class(builder)(cfg, name).build_datasets()["train"]


def preflight(builder, storage, **build_info):
    cfg = section(builder, str(storage))
    cfg.build_info.update(build_info)
    return list(map(str, registry.get_builder_class(builder).preflight(cfg, "datasets.own")))


def texts(records):
    return [(record.image, record.text) for record in records]


# what is read

FILES = {
    "lines.jsonl": '\ufeff{"image": "a.jpg", "caption": "A dog."}\n\n{"file_name": "sub/b.png", "text": "Ein Hund."}\n',
    "list.json": json.dumps(
        [{"image": "./a.jpg", "caption": "A dog."}, {"image": ["sub/b.png"], "text": "Ein Hund."}]
    ),
    "coco.json": json.dumps(
        {
            "images": [{"id": 7, "file_name": "a.jpg"}, {"id": "x", "file_name": "sub/b.png"}],
            "annotations": [
                {"image_id": 7, "caption": "A dog."},
                {"image_id": "x", "caption": "Ein Hund."},
            ],
        }
    ),
    "table.csv": 'image,caption\na.jpg,"A dog."\nsub/b.png,Ein Hund.\n',
    "table.tsv": "file_name\ttext\na.jpg\tA dog.\nsub/b.png\tEin Hund.\n",
}


@pytest.mark.parametrize("name", FILES)
def test_all_formats_give_the_same_records(tmp_path, name):
    write_images(tmp_path, "a.jpg", "sub/b.png")
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    assert texts(read_records(tmp_path / name, tmp_path)) == [
        ("a.jpg", "A dog."),
        ("sub/b.png", "Ein Hund."),
    ]
    assert preflight("image_text_jsonl", tmp_path / name) == []
    dataset = build("image_text_jsonl", tmp_path / name, "my_set")
    samples = [dataset[index] for index in range(2)]
    assert [sample["text_input"] for sample in samples] == ["A dog.", "Ein Hund."]
    assert (
        all(sample["sample_id"].startswith(f"{name} ") for sample in samples)
        and "turns" not in samples[0]
    )
    assert dataset.name == "my_set"


@pytest.mark.parametrize("name", ["llava.json", "llava.jsonl"])
def test_conversations(tmp_path, name):
    write_images(tmp_path / "images", "a.jpg")
    record = {"id": "1", "image": "a.jpg", "conversations": LLAVA}
    (tmp_path / name).write_text(json.dumps(record if name.endswith("l") else [record]))
    dataset = build("image_text_jsonl", tmp_path / name, images=str(tmp_path / "images"))
    assert (dataset[0]["turns"], dataset[0]["text_input"]) == (TURNS, "A dog.")


def test_an_instruction_is_a_conversation_of_one_turn(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"image": "a.jpg", "caption": "Red.", "instruction": "Which colour?"}'
    )
    assert texts(read_records(tmp_path / "a.jsonl", tmp_path)) == [
        ("a.jpg", (("Which colour?", "Red."),))
    ]


def test_answers_go_through_the_text_processor_and_questions_do_not(tmp_path):
    write_images(tmp_path, "a.jpg")
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.jpg", "conversations": LLAVA}))
    cfg = section(
        "image_text_jsonl",
        str(tmp_path / "a.jsonl"),
        text_processor={"train": {"name": "blip_caption"}},
    )
    dataset = registry.get_builder_class("image_text_jsonl")(cfg).build_datasets()["train"]
    assert dataset[0]["turns"] == (("What is it?", "a dog"), ("Which colour?", "brown"))


def test_a_folder_with_texts(tmp_path):
    write_images(tmp_path, "b.JPG", "a.webp", "deep/er/a.jpeg", ".hidden.jpg", "without.png")
    for name, text in {"b": "Bee.\n", "a": "\ufeffA dog.", "deep/er/a": "Deeper."}.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    assert preflight("image_text_folder", tmp_path) == []
    dataset = build("image_text_folder", tmp_path)
    found = {dataset[index]["sample_id"]: dataset[index]["text_input"] for index in range(4)}
    assert found == {"a.webp": "A dog.", "b.JPG": "Bee.", "deep/er/a.jpeg": "Deeper."}
    assert dataset.skips.report()["no_caption"] == 2  # read twice above, counted each time


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl"])
def test_a_captions_file_takes_precedence_over_text_files(tmp_path, name):
    write_images(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / name).write_text('{"file_name": "a.jpg", "text": "From the file."}')
    (tmp_path / "a.txt").write_text("From the text.")
    (tmp_path / "b.txt").write_text("Bee.")
    assert texts(read_folder(tmp_path)) == [("a.jpg", "From the file."), ("b.jpg", None)]
    dataset = build("image_text_folder", tmp_path)
    assert [dataset[index]["text_input"] for index in range(2)] == ["From the file.", "Bee."]


def test_tar_files(tmp_path):
    samples = {
        "0": {"png": jpeg(0), "txt": b"A dog."},
        "1": {"webp": jpeg(1), "json": json.dumps({"conversations": LLAVA}).encode()},
        "2": {"jpg": jpeg(2), "json": b'{"width": 3}', "txt": b"The text beside."},
        "3": {"jpg": jpeg(3), "json": b'{"conversations": []}', "txt": b"The second choice."},
        "4": pair(4),
    }
    write_tar(tmp_path / "0.tar", samples)
    assert preflight("webdataset", tmp_path / "*.tar") == []
    dataset = build("webdataset", tmp_path / "*.tar", "mine")
    dataset.epochs = 1
    found = {sample["sample_id"]: (sample["text_input"], sample.get("turns")) for sample in dataset}
    assert found == {
        "0.tar/0": ("A dog.", None),
        "0.tar/1": ("A dog.", TURNS),
        "0.tar/2": ("The text beside.", None),
        "0.tar/3": ("The second choice.", None),
        "0.tar/4": ("Caption 4.", None),
    }


# batches


def test_a_batch_holds_one_dataset_and_maybe_both_kinds_of_samples(tmp_path):
    write_images(tmp_path, "a.jpg")
    records = [
        {"image": "a.jpg", "conversations": LLAVA},
        {"image": "a.jpg", "caption": "Just a dog."},
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, records)))
    own = build("image_text_jsonl", tmp_path / "own.jsonl")
    plain = build("webdataset", shard(tmp_path, "0", range(8)), "plain")
    batches = loader([own, plain], [1, 1], batch_size=2)
    kinds = set()
    for _ in range(20):
        batch = next(batches)
        (name,) = {sample_id.split("/")[0] for sample_id in batch["sample_id"]}
        kinds.add(name)
        if name == "own":
            assert sorted(batch["turns"], key=len) == [(), TURNS]
            assert sorted(batch["text_input"]) == ["A dog.", "Just a dog."]
        else:
            assert "turns" not in batch
    assert kinds == {"own", "plain"}


# the key `builder`


def config(tmp_path, text):
    (tmp_path / "c.yaml").write_text(
        f"model: {{arch: mini_gpt4, model_type: pretrain_vicuna}}\ndatasets:\n{text}"
    )
    return Config(
        Namespace(cfg_path=tmp_path / "c.yaml", options=[f"model.llama_model={tmp_path}"])
    )


def problems_of(tmp_path, text):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError) as error:
        config(tmp_path, text)
    return [str(problem) for problem in error.value.problems if problem.key.startswith("datasets")]


def test_any_section_may_name_its_builder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    sections = "  pets: {builder: image_text_jsonl, build_info: {storage: a.json, images: b}}\n  laion: {}\n"
    vision = {key: tmp_path / key for key in ("vit_ckpt", "q_former_model")}
    for path in [*vision.values(), tmp_path / "pytorch_model.bin"]:
        path.write_bytes(b"PK\3\4")
    (tmp_path / "c.yaml").write_text(
        f"model: {{arch: mini_gpt4, model_type: pretrain_vicuna, llama_model: {tmp_path}}}\ndatasets:\n{sections}"
    )
    cfg = Config(
        Namespace(
            cfg_path=tmp_path / "c.yaml", options=[f"model.{k}={v}" for k, v in vision.items()]
        )
    )
    pets, laion = cfg.datasets_cfg.pets, cfg.datasets_cfg.laion
    assert (pets.builder, pets.build_info.images, pets.data_type) == (
        "image_text_jsonl",
        "b",
        "images",
    )
    assert laion.builder is None and laion.build_info.storage.endswith(".tar")


KNOWN = f"known: {', '.join(registry.names('builder'))}."
ADD_ONE = "Add one in minigpt4/datasets/builders/__init__.py, or in a module of your own that the configuration names "
ADD_ONE += "under imports: [my_package.my_module], as docs/custom_data.md shows"
WRONG_NAMES = {
    "  pets: {builder: image_text_foldr}\n": (
        f"datasets.pets.builder: unknown dataset builder 'image_text_foldr'; {KNOWN} Did you mean 'image_text_folder'? "
        f"{ADD_ONE} (c.yaml line 3)"
    ),
    "  pets: {build_info: {storage: x}}\n": (
        f"datasets.pets: unknown dataset builder 'pets'; {KNOWN} {ADD_ONE}; "
        "a section of any other name needs the key datasets.pets.builder (c.yaml line 3)"
    ),
    "  pets: {builder: image_text_folder, build_info: {storage: x, images: y}}\n": (
        "datasets.pets.build_info.images: unknown key. Known: storage (c.yaml line 3)"
    ),
    "  pets:\n    builder: image_text_jsonl\n    build_info: {image: y}\n": (
        "datasets.pets.build_info.image: unknown key. Did you mean 'images'? (c.yaml line 5)"
    ),
}


@pytest.mark.parametrize("text", WRONG_NAMES)
def test_wrong_names(tmp_path, text):
    assert problems_of(tmp_path, text) == [WRONG_NAMES[text]]
