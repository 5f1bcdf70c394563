"""Own pictures with captions or conversations: what is read, what is counted, what is refused and in which words."""

import json
import logging
from argparse import Namespace

import pytest

from minigpt4.common.config import Config, ConfigError
from minigpt4.common.registry import registry
from minigpt4.datasets.datasets.annotations import Fault, read_records
from minigpt4.datasets.datasets.base_dataset import DataError
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


def pictures(folder, *names):
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
    return registry.get_builder_class(builder).preflight(cfg, "datasets.own")


def texts(records):
    return [(record.image, record.text) for record in records]


# what is read

FILES = {
    "lines.jsonl": '\ufeff{"image": "a.jpg", "caption": "A dog."}\n\n{"file_name": "sub/b.png", "text": "Ein Hund."}\n',
    "list.json": json.dumps([{"image": "./a.jpg", "caption": "A dog."}, {"image": ["sub/b.png"], "text": "Ein Hund."}]),
    "coco.json": json.dumps(
        {
            "images": [{"id": 7, "file_name": "a.jpg"}, {"id": "x", "file_name": "sub/b.png"}],
            "annotations": [{"image_id": 7, "caption": "A dog."}, {"image_id": "x", "caption": "Ein Hund."}],
        }
    ),
    "table.csv": 'image,caption\na.jpg,"A dog."\nsub/b.png,Ein Hund.\n',
    "table.tsv": "file_name\ttext\na.jpg\tA dog.\nsub/b.png\tEin Hund.\n",
}


@pytest.mark.parametrize("name", FILES)
def test_the_formats_say_the_same(tmp_path, name):
    pictures(tmp_path, "a.jpg", "sub/b.png")
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    assert texts(read_records(tmp_path / name, tmp_path)) == [("a.jpg", "A dog."), ("sub/b.png", "Ein Hund.")]
    assert preflight("image_text_jsonl", tmp_path / name) == []
    dataset = build("image_text_jsonl", tmp_path / name, "my_set")
    samples = [dataset[index] for index in range(2)]
    assert [sample["text_input"] for sample in samples] == ["A dog.", "Ein Hund."]
    assert all(sample["sample_id"].startswith(f"{name} ") for sample in samples) and "turns" not in samples[0]
    assert dataset.name == "my_set"


@pytest.mark.parametrize("name", ["llava.json", "llava.jsonl"])
def test_conversations(tmp_path, name):
    pictures(tmp_path / "images", "a.jpg")
    record = {"id": "1", "image": "a.jpg", "conversations": LLAVA}
    (tmp_path / name).write_text(json.dumps(record if name.endswith("l") else [record]))
    dataset = build("image_text_jsonl", tmp_path / name, images=str(tmp_path / "images"))
    assert (dataset[0]["turns"], dataset[0]["text_input"]) == (TURNS, "A dog.")


def test_an_instruction_is_a_conversation_of_one_turn(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"image": "a.jpg", "caption": "Red.", "instruction": "Which colour?"}')
    assert texts(read_records(tmp_path / "a.jsonl", tmp_path)) == [("a.jpg", (("Which colour?", "Red."),))]


def test_answers_go_through_the_text_processor_and_questions_do_not(tmp_path):
    pictures(tmp_path, "a.jpg")
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.jpg", "conversations": LLAVA}))
    cfg = section("image_text_jsonl", str(tmp_path / "a.jsonl"), text_processor={"train": {"name": "blip_caption"}})
    dataset = registry.get_builder_class("image_text_jsonl")(cfg).build_datasets()["train"]
    assert dataset[0]["turns"] == (("What is it?", "a dog"), ("Which colour?", "brown"))


def test_a_folder_with_texts(tmp_path):
    pictures(tmp_path, "b.JPG", "a.webp", "deep/er/a.jpeg", ".hidden.jpg", "without.png")
    for name, text in {"b": "Bee.\n", "a": "\ufeffA dog.", "deep/er/a": "Deeper."}.items():
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    assert preflight("image_text_folder", tmp_path) == []
    dataset = build("image_text_folder", tmp_path)
    found = {dataset[index]["sample_id"]: dataset[index]["text_input"] for index in range(4)}
    assert found == {"a.webp": "A dog.", "b.JPG": "Bee.", "deep/er/a.jpeg": "Deeper."}
    assert dataset.skips.report()["no_caption"] == 2  # met twice above, counted each time


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl"])
def test_a_captions_file_goes_before_the_texts(tmp_path, name):
    pictures(tmp_path, "a.jpg", "b.jpg", "c.jpg")
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
        "3": {"jpg": jpeg(3), "json": b'{"conversations": []}', "txt": b"Not a second choice."},
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
        "0.tar/4": ("Caption 4.", None),
    }
    assert dataset.skips.report() == {"seen": 5, "bad_caption": 1}


# batches


def test_a_batch_holds_one_dataset_and_maybe_both_kinds_of_samples(tmp_path):
    pictures(tmp_path, "a.jpg")
    records = [{"image": "a.jpg", "conversations": LLAVA}, {"image": "a.jpg", "caption": "Just a dog."}]
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


# what is counted

FAULTS = {
    "not JSON": ('{"image": "a.jpg", "caption": ', "bad_record", "not valid JSON (Expecting value: line 1 column 31"),
    "a list": ("[1]", "bad_record", "is list, not a mapping"),
    "no picture": ('{"id": 1, "caption": "x"}', "no_image", "'image' is missing (keys: id, caption)"),
    "two pictures": (
        '{"image": ["a.jpg", "b.jpg"], "caption": "x"}',
        "bad_record",
        "image is ['a.jpg', 'b.jpg']; expected the path of one picture",
    ),
    "no caption": ('{"image": "a.jpg", "captoin": "x"}', "no_caption", "'caption' is missing (keys: image, captoin)"),
    "no text": ('{"image": "a.jpg", "caption": 7}', "bad_caption", "caption is int, not text"),
    "blank": ('{"image": "a.jpg", "caption": " "}', "bad_caption", "caption is empty"),
    "turns of the wrong kind": (
        '{"image": "a.jpg", "conversations": "hello"}',
        "bad_caption",
        "'conversations' has str; expected questions and answers in turn",
    ),
    "no answer": (
        json.dumps({"image": "a.jpg", "conversations": LLAVA[:3]}),
        "bad_caption",
        "'conversations' has 3 messages; expected questions and answers in turn",
    ),
    "wrong order": (
        json.dumps({"image": "a.jpg", "conversations": LLAVA[1::-1]}),
        "bad_caption",
        'message 0 is {"from": "gpt", "value": "A dog."}; expected {"from": "human", "value": text}',
    ),
    "other keys": (
        '{"image": "a.jpg", "conversations": [{"role": "user", "content": "x"}, {"role": "assistant"}]}',
        "bad_caption",
        'message 0 is {"role": "user", "content": "x"}; expected {"from": "human", "value": text}',
    ),
    "empty answer": (
        json.dumps({"image": "a.jpg", "conversations": [LLAVA[0], {"from": "gpt", "value": "\n"}]}),
        "bad_caption",
        "an empty question or answer in 'conversations'",
    ),
    "two marks": (
        json.dumps({"image": "a.jpg", "conversations": [*LLAVA[:2], *LLAVA[:2]]}),
        "bad_record",
        "2 <image> in the conversation; a sample has one picture",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_record_that_cannot_be_used_is_counted(tmp_path, name, caplog):
    line, reason, detail = FAULTS[name]
    pictures(tmp_path, "a.jpg")
    (tmp_path / "own.jsonl").write_text('{"image": "a.jpg", "caption": "Fine."}\n' + line)
    _, fault = read_records(tmp_path / "own.jsonl", tmp_path)
    assert (fault.where, fault.reason) == ("own.jsonl line 2", reason)
    assert fault.detail.startswith(detail)
    with caplog.at_level(logging.WARNING):
        dataset = build("image_text_jsonl", tmp_path / "own.jsonl")
        assert f"own: 1 of 2 records cannot be used; first: own.jsonl line 2: {reason} ({detail}" in caplog.text
    assert [dataset[index]["text_input"] for index in (0, 1)] == ["Fine.", "Fine."]
    assert dataset.skips.report() == {"seen": 3, reason: 1}


def test_pictures_that_are_missing_or_broken_are_counted(tmp_path):
    pictures(tmp_path, "a.jpg")
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    lines = [json.dumps({"image": f"{name}.jpg", "caption": "x"}) for name in "abc"]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    dataset = build("image_text_jsonl", tmp_path / "own.jsonl")
    assert dataset[1]["sample_id"] == "own.jsonl line 1"
    assert dataset.skips.report() == {"seen": 3, "bad_image": 1, "missing_file": 1}


@pytest.mark.parametrize(("content", "detail"), [(b" \n", "a.txt is empty"), (b"\xff", "a.txt: 'utf-8' codec can't")])
def test_a_text_file_without_a_caption_is_counted(tmp_path, content, detail):
    pictures(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_text("Bee.")
    dataset = build("image_text_folder", tmp_path)
    assert dataset[0]["text_input"] == "Bee."
    assert dataset.skips.report() == {"seen": 2, "bad_caption": 1}
    assert dataset.skips.first.startswith(detail)


def test_an_annotation_of_coco_without_its_image_is_counted(tmp_path):
    annotations = [{"image_id": 1, "caption": "x"}, {"image_id": 2, "caption": "x"}, {"caption": "x"}, 7]
    content = {"images": [{"id": 1, "file_name": "a.jpg"}, {"id": []}, 3], "annotations": annotations}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    faults = [record for record in read_records(tmp_path / "coco.json", tmp_path) if isinstance(record, Fault)]
    assert faults == [
        Fault("coco.json annotation 1", "no_image", "image_id 2 is not among 'images'"),
        Fault("coco.json annotation 2", "bad_record", "has no 'image_id'"),
        Fault("coco.json annotation 3", "bad_record", "has no 'image_id'"),
    ]


# what is refused

LEADS_OUT = "leads out of the picture folder '{tmp}'; give paths below it, or name a folder that holds all pictures"
ADDRESS = "is an address; nothing is fetched while training. Download the pictures and give their paths"
REFUSED = {
    "../secret.jpg": f"'../secret.jpg' {LEADS_OUT}",
    "sub/../../x.jpg": f"'sub/../../x.jpg' {LEADS_OUT}",
    "..\\x.jpg": f"'..\\x.jpg' {LEADS_OUT}",
    "/etc/passwd": f"'/etc/passwd' {LEADS_OUT}",
    "http://example.org/a.jpg": f"'http://example.org/a.jpg' {ADDRESS}",
    "s3://bucket/a.jpg": f"'s3://bucket/a.jpg' {ADDRESS}",
    "data:image/png;base64,AAAA": f"'data:image/png;base64,AAAA' {ADDRESS}",
    "link.jpg": f"'link.jpg' {LEADS_OUT}",
    "linked/x.jpg": f"'linked/x.jpg' {LEADS_OUT}",
}


@pytest.fixture
def root(tmp_path):
    """A picture folder with links to what lies beside it."""
    folder = tmp_path / "root"
    pictures(tmp_path, "secret.jpg", "beside/x.jpg", "root/a.jpg")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "linked").symlink_to(tmp_path / "beside")
    return folder


@pytest.mark.parametrize("image", REFUSED)
def test_paths_that_lead_elsewhere_are_refused(root, image):
    lines = [{"image": "a.jpg", "caption": "Fine."}, {"image": image, "caption": "x"}]
    (root / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    message = f"own.jsonl line 2: {REFUSED[image].format(tmp=root)}"
    assert preflight("image_text_jsonl", root / "own.jsonl") == [f"datasets.own.build_info.storage: {message}"]


def test_a_link_met_only_while_training_ends_the_run(root):
    (root / "own.jsonl").write_text('{"image": "link.jpg", "caption": "x"}')
    dataset = build("image_text_jsonl", root / "own.jsonl")
    with pytest.raises(DataError, match=r"^own.jsonl line 1: 'link.jpg' leads out of the picture folder"):
        next(loader([dataset]))


def test_a_linked_text_file_is_refused(root, tmp_path):
    (tmp_path / "password.txt").write_text("secret")
    (root / "a.txt").symlink_to(tmp_path / "password.txt")
    with pytest.raises(DataError, match="a.txt' leads out of the picture folder"):
        build("image_text_folder", root)[0]


def test_links_and_absolute_paths_inside_are_fine(root, tmp_path):
    (root / "inner.jpg").symlink_to(root / "a.jpg")
    (tmp_path / "other_name").symlink_to(root)
    lines = [{"image": name, "caption": name} for name in ("inner.jpg", str(tmp_path / "other_name/a.jpg"))]
    (root / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    where = {"images": str(tmp_path / "other_name")}
    assert preflight("image_text_jsonl", root / "own.jsonl", **where) == []
    assert build("image_text_jsonl", root / "own.jsonl", **where)[1]["text_input"] == lines[1]["caption"]


def written(name, content):
    def make(tmp):
        pictures(tmp, "a.jpg")
        (tmp / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return {"storage": str(tmp / name)}

    return make


def folder(*names):
    def make(tmp):
        pictures(tmp / "p", *[name for name in names if not name.endswith("l")])
        for name in names:
            if name.endswith("l"):
                (tmp / "p" / name).write_text('{"image": "a.jpg", "caption": "x"}')
        (tmp / "p").mkdir(exist_ok=True)
        return {"storage": str(tmp / "p")}

    return make


EXPECTED = (
    '{"image": path, "caption": text} or {"image": path, "conversations": [{"from": "human", "value": text}, '
    '{"from": "gpt", "value": text}, ..]}'
)
COCO = 'or COCO captions: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}'
MISTAKES = [
    ("image_text_jsonl", lambda tmp: {"storage": str(tmp / "x.jsonl")}, "nothing at '{tmp}/x.jsonl'; expected the path of an annotation file"),
    ("image_text_jsonl", lambda tmp: {"storage": 7}, "7; expected the path of an annotation file"),
    ("image_text_folder", lambda tmp: {"storage": str(tmp / "x")}, "nothing at '{tmp}/x'; expected the path of a folder of pictures"),
    (
        "image_text_jsonl",
        lambda tmp: {"storage": str(tmp / "x.jsonl"), "images": str(tmp / "none")},
        "no folder at '{tmp}/none' for the pictures; set build_info.images to it",
    ),
    (
        "image_text_jsonl",
        written("a.jsonl", '\n{"img": "a.jpg", "caption": "x"}\n'),
        f"{{tmp}}/a.jsonl: none of its 1 records can be used; a.jsonl line 2: 'image' is missing (keys: img, caption); expected {EXPECTED}",
    ),
    ("image_text_jsonl", written("a.jsonl", ""), f"{{tmp}}/a.jsonl: has no record; expected records like {EXPECTED}"),
    ("image_text_jsonl", written("a.json", "{"), "{tmp}/a.json: not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
    (
        "image_text_jsonl",
        written("a.json", '{"image": "a.jpg"}\n{}'),
        "{tmp}/a.json: not valid JSON (Extra data: line 2 column 1 (char 19)); one record a line is read from files called .jsonl",
    ),
    (
        "image_text_jsonl",
        written("a.json", '{"annotations": [], "info": 1}'),
        f"{{tmp}}/a.json: found a mapping with annotations, info; expected a list of {EXPECTED}, {COCO}",
    ),
    ("image_text_jsonl", written("a.json", "7"), f"{{tmp}}/a.json: found int; expected a list of {EXPECTED}, {COCO}"),
    (
        "image_text_jsonl",
        written("a.jsonl", b"\xff\xfe"),
        "{tmp}/a.jsonl: cannot be read ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte); save it as UTF-8 text",
    ),
    (
        "image_text_jsonl",
        written("a.jsonl", '{"image": "train/b.jpg", "caption": "x"}'),
        "a.jsonl line 1: no file 'train/b.jpg' in the picture folder '{tmp}', nor any other of 1 that were looked for; name the folder that the paths start from (build_info.images)",
    ),
    ("image_text_folder", folder(), "'{tmp}/p' has no picture; expected .jpg, .png, .jpeg, .webp files"),
    (
        "image_text_folder",
        folder("a.jpg", "b.jpg"),
        "'{tmp}/p' has 2 pictures and no caption; expected a .txt file beside each (first: a.txt), or captions.jsonl with {{\"image\": path, \"caption\": text}} a line",
    ),
    ("image_text_folder", folder("a.jpg", "captions.jsonl", "metadata.jsonl"), "'{tmp}/p' has captions.jsonl and metadata.jsonl; keep one of them"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("builder", "make", "message"), MISTAKES, ids=lambda part: part[:40] if isinstance(part, str) else ""
)
def test_what_is_said_of_wrong_data(tmp_path, builder, make, message):
    info = make(tmp_path)
    cfg = section(builder, info["storage"])
    cfg.build_info.update(info)
    (problem,) = registry.get_builder_class(builder).preflight(cfg, "datasets.own")
    wanted = message.replace("{tmp}", str(tmp_path)).replace("{{", "{").replace("}}", "}")
    assert problem == f"datasets.own.build_info.storage: {wanted}"


# the key `builder`


def config(tmp_path, text):
    (tmp_path / "c.yaml").write_text(f"model: {{arch: mini_gpt4, model_type: pretrain_vicuna}}\ndatasets:\n{text}")
    return Config(Namespace(cfg_path=tmp_path / "c.yaml", options=[f"model.llama_model={tmp_path}"]))


def problems_of(tmp_path, text):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError) as error:
        config(tmp_path, text)
    return [line for line in error.value.problems if line.startswith("datasets")]


def test_any_section_may_name_its_builder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    sections = "  pets: {builder: image_text_jsonl, build_info: {storage: a.json, images: b}}\n  laion: {}\n"
    vision = {key: tmp_path / key for key in ("vit_ckpt", "q_former_model")}
    for path in vision.values():
        path.touch()
    (tmp_path / "c.yaml").write_text(
        f"model: {{arch: mini_gpt4, model_type: pretrain_vicuna, llama_model: {tmp_path}}}\ndatasets:\n{sections}"
    )
    cfg = Config(Namespace(cfg_path=tmp_path / "c.yaml", options=[f"model.{k}={v}" for k, v in vision.items()]))
    pets, laion = cfg.datasets_cfg.pets, cfg.datasets_cfg.laion
    assert (pets.builder, pets.build_info.images, pets.data_type) == ("image_text_jsonl", "b", "images")
    assert laion.builder is None and laion.build_info.storage.endswith(".tar")


KNOWN = "known: cc_sbu, cc_sbu_align, image_text_folder, image_text_jsonl, laion, webdataset."
WRONG_NAMES = {
    "  pets: {builder: image_text_foldr}\n": (
        f"datasets.pets.builder: unknown dataset builder 'image_text_foldr'; {KNOWN} Did you mean 'image_text_folder'? "
        "Add one in minigpt4/datasets/builders/__init__.py (c.yaml line 3)"
    ),
    "  pets: {build_info: {storage: x}}\n": (
        f"datasets.pets: unknown dataset builder 'pets'; {KNOWN} Add one in minigpt4/datasets/builders/__init__.py; "
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
