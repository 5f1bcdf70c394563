"""Users' own images: records that are skipped and counted, files that are rejected, messages."""

import json
import logging

import pytest
import torch
from PIL import Image

from minigpt4.common.config import Problem
from minigpt4.common.registry import registry
from minigpt4.datasets.datasets.annotations import Fault, Record, read_records
from minigpt4.datasets.datasets.image_text_dataset import ImageTextDataset
from minigpt4.processors import BlipCaptionProcessor
from tests.datasets.shards import jpeg
from tests.datasets.test_builders import section
from tests.datasets.test_own_data import LLAVA, build, preflight, write_images

# what is counted

FAULTS = {
    "not JSON": (
        '{"image": "a.jpg", "caption": ',
        "bad_record",
        "not valid JSON (Expecting value: line 1 column 31",
    ),
    "a list": ("[1]", "bad_record", "is list, not a mapping"),
    "no image": ('{"id": 1, "caption": "x"}', "no_image", "'image' is missing (keys: id, caption)"),
    "two images": (
        '{"image": ["a.jpg", "b.jpg"], "caption": "x"}',
        "bad_record",
        "image is ['a.jpg', 'b.jpg']; expected the path of one image",
    ),
    "no caption": (
        '{"image": "a.jpg", "captoin": "x"}',
        "no_caption",
        "'caption' is missing (keys: image, captoin)",
    ),
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
    "no content": (
        '{"image": "a.jpg", "conversations": [{"role": "user", "content": "x"}, {"role": "assistant"}]}',
        "bad_caption",
        'message 1 is {"role": "assistant"}; expected {"from": "gpt", "value": text}',
    ),
    "empty answer": (
        json.dumps({"image": "a.jpg", "conversations": [LLAVA[0], {"from": "gpt", "value": "\n"}]}),
        "bad_caption",
        "an empty question or answer in 'conversations'",
    ),
    "two marks": (
        json.dumps({"image": "a.jpg", "conversations": [*LLAVA[:2], *LLAVA[:2]]}),
        "bad_record",
        "has 2 image marks (<image>, <image>); a sample has one image",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_record_that_cannot_be_used_is_counted(tmp_path, name, caplog):
    line, reason, detail = FAULTS[name]
    write_images(tmp_path, "a.jpg")
    (tmp_path / "own.jsonl").write_text('{"image": "a.jpg", "caption": "Fine."}\n' + line)
    _, fault = read_records(tmp_path / "own.jsonl", tmp_path)
    assert (fault.where, fault.reason) == ("own.jsonl line 2", reason)
    assert fault.detail.startswith(detail)
    with caplog.at_level(logging.WARNING):
        dataset = build("image_text_jsonl", tmp_path / "own.jsonl")
        assert (
            f"own: 1 of 2 records cannot be used; first: own.jsonl line 2: {reason} ({detail}"
            in caplog.text
        )
    assert [dataset[index]["text_input"] for index in (0, 1)] == ["Fine.", "Fine."]
    assert dataset.skips.report() == {"seen": 3, reason: 1}


def test_images_that_are_missing_or_broken_are_counted(tmp_path):
    write_images(tmp_path, "a.jpg")
    (tmp_path / "b.jpg").write_bytes(b"no image")
    lines = [json.dumps({"image": f"{name}.jpg", "caption": "x"}) for name in "abc"]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    dataset = build("image_text_jsonl", tmp_path / "own.jsonl")
    assert dataset[1]["sample_id"] == "own.jsonl line 1"
    assert dataset.skips.report() == {"seen": 3, "bad_image": 1, "missing_file": 1}


@pytest.mark.parametrize(
    ("content", "detail"), [(b" \n", "txt is empty"), (b"\xff", "txt: 'utf-8' codec can't")]
)
def test_a_text_file_without_a_caption_is_counted(tmp_path, content, detail):
    write_images(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_text("Bee.")
    dataset = build("image_text_folder", tmp_path)
    assert dataset[0]["text_input"] == "Bee."
    assert dataset.skips.report() == {"seen": 2, "bad_caption": 1}
    assert dataset.skips.first.startswith(detail)


def test_a_coco_annotation_without_its_image_is_counted(tmp_path):
    annotations = [
        {"image_id": 1, "caption": "x"},
        {"image_id": 2, "caption": "x"},
        {"caption": "x"},
        7,
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}, {"id": []}, 3],
        "annotations": annotations,
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    faults = [
        record
        for record in read_records(tmp_path / "coco.json", tmp_path)
        if isinstance(record, Fault)
    ]
    assert faults == [
        Fault("coco.json annotation 1", "no_image", "image_id 2 is not among 'images'"),
        Fault("coco.json annotation 2", "bad_record", "has no 'image_id'"),
        Fault("coco.json annotation 3", "bad_record", "has no 'image_id'"),
    ]


# what is refused

LEADS_OUT = (
    "leads out of the image folder '{tmp}'; write paths without '..' that start from one folder with all images, links "
    "out of it not followed, and name that folder"
)
ADDRESS = (
    "is an address; nothing is fetched while training. Download the images and give their paths"
)
REFUSED = {
    "../secret.jpg": f"'../secret.jpg' {LEADS_OUT}",
    "sub/../../x.jpg": f"'sub/../../x.jpg' {LEADS_OUT}",
    "..\\x.jpg": f"'..\\x.jpg' {LEADS_OUT}",
    "/etc/passwd": f"'/etc/passwd' {LEADS_OUT}",
    r"C:\images\a.jpg": r"'C:\images\a.jpg' is an absolute path of Windows; write paths that start from the image folder '{tmp}'",
    "http://example.org/a.jpg": f"'http://example.org/a.jpg' {ADDRESS}",
    "s3://bucket/a.jpg": f"'s3://bucket/a.jpg' {ADDRESS}",
    "data:image/png;base64,AAAA": f"'data:image/png;base64,AAAA' {ADDRESS}",
    "link.jpg": f"'link.jpg' {LEADS_OUT}",
    "linked/x.jpg": f"'linked/x.jpg' {LEADS_OUT}",
}


@pytest.fixture
def root(tmp_path):
    """An image folder with links to files and folders beside it."""
    folder = tmp_path / "root"
    write_images(tmp_path, "secret.jpg", "beside/x.jpg", "root/a.jpg")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "linked").symlink_to(tmp_path / "beside")
    return folder


@pytest.mark.parametrize("image", REFUSED)
def test_paths_that_lead_out_of_the_folder_are_rejected(root, image):
    lines = [{"image": "a.jpg", "caption": "Fine."}, {"image": image, "caption": "x"}]
    (root / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    message = f"own.jsonl line 2: {REFUSED[image].format(tmp=root)}"
    assert preflight("image_text_jsonl", root / "own.jsonl") == [
        f"datasets.own.build_info.storage: {message}"
    ]


def test_a_link_out_found_only_during_training_is_counted(root):
    lines = [{"image": name, "caption": "x"} for name in ("link.jpg", "a.jpg")]
    (root / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    dataset = build("image_text_jsonl", root / "own.jsonl")
    assert dataset[0]["sample_id"] == "own.jsonl line 2"
    assert (
        dataset.skips.report() == {"seen": 2, "bad_image": 1}
        and "link.jpg is a link out of" in dataset.skips.first
    )


@pytest.mark.parametrize("link", ["link.jpg", "linked", "a.txt"])
def test_a_folder_with_a_link_out_is_rejected_by_name(root, tmp_path, link):
    for name in {"link.jpg", "linked"} - {link}:
        (root / name).unlink()
    (root / "a.txt").write_text("Red.") if link != "a.txt" else (root / "a.txt").symlink_to(
        tmp_path / "password.txt"
    )
    (problem,) = preflight("image_text_folder", root)
    assert f"'{root}': '{link}' is a link out of the folder, to '{tmp_path}/" in problem


def test_links_and_absolute_paths_inside_are_fine(root, tmp_path):
    (root / "inner.jpg").symlink_to(root / "a.jpg")
    (tmp_path / "other_name").symlink_to(root)
    lines = [
        {"image": name, "caption": name}
        for name in ("inner.jpg", str(tmp_path / "other_name/a.jpg"))
    ]
    (root / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    where = {"images": str(tmp_path / "other_name")}
    assert preflight("image_text_jsonl", root / "own.jsonl", **where) == []
    assert (
        build("image_text_jsonl", root / "own.jsonl", **where)[1]["text_input"]
        == lines[1]["caption"]
    )


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d\n"


def written(name, content):
    def make(tmp):
        write_images(tmp, "a.jpg")
        (tmp / "c.png").write_text(LFS)
        (tmp / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return {"storage": str(tmp / name)}

    return make


def folder(*names):
    def make(tmp):
        write_images(tmp / "p", *[name for name in names if not name.endswith("l")])
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
COCO = (
    'or COCO captions: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}'
)
MISTAKES = [
    ("image_text_jsonl", lambda tmp: {"storage": str(tmp / "x.jsonl")}, "nothing at '{tmp}/x.jsonl'; expected the path of an annotation file"),
    ("image_text_jsonl", lambda tmp: {"storage": 7}, "7; expected the path of an annotation file"),
    ("image_text_folder", lambda tmp: {"storage": str(tmp / "x")}, "nothing at '{tmp}/x'; expected the path of a folder of images"),
    (
        "image_text_jsonl",
        lambda tmp: {"storage": str(tmp / "x.jsonl"), "images": str(tmp / "none")},
        "no folder at '{tmp}/none' for the images; set build_info.images to it",
    ),
    (
        "image_text_jsonl",
        written("a.jsonl", '\n{"img": "a.jpg", "caption": "x"}\n'),
        f"{{tmp}}/a.jsonl: none of its 1 records can be used; a.jsonl line 2: 'image' is missing (keys: img, caption); expected {EXPECTED}",
    ),
    ("image_text_jsonl", written("a.jsonl", ""), f"{{tmp}}/a.jsonl: no record to train on; expected {EXPECTED}"),
    (
        "image_text_jsonl",
        written("a.json", '{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}'),
        "{tmp}/a.json: the 'id' 1 is that of two images, 'a' and 'b'; give each file of captions by itself, or number "
        "the images anew",
    ),
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
        "a.jsonl line 1: no file 'train/b.jpg' in the image folder '{tmp}', nor any other of 1 that were looked for; name the folder that the paths start from (build_info.images)",
    ),
    (
        "image_text_jsonl",
        written("a.jsonl", '{"image": "c.png", "caption": "x"}'),
        "'{tmp}/c.png' is a Git LFS pointer, not the file itself: install git-lfs and run `git lfs pull` in its clone, or download it by hand (1 such images of 1 that were looked at)",
    ),
    (
        "image_text_jsonl",
        written("a.jsonl", LFS),
        "{tmp}/a.jsonl: is a Git LFS pointer, not the file itself: install git-lfs and run `git lfs pull` in its clone, or download it by hand",
    ),
    (
        "image_text_jsonl",
        written("a.csv", "<html>"),
        "{tmp}/a.csv: is an HTML page, not records: the download went wrong. Delete it and download it again",
    ),
    (
        "image_text_jsonl",
        written("a.parquet", "PAR1"),
        "{tmp}/a.parquet: not valid JSON (Expecting value: line 1 column 1 (char 0)); only files called .jsonl, .ndjson, .csv, .tsv are read in another way",
    ),
    (
        "image_text_jsonl",
        written("a.csv", 'image,caption\na.jpg,x\na.jpg,"Red.\na.jpg,x\n'),
        "{tmp}/a.csv: the record that begins in line 3 cannot be read (unexpected end of data); close every quote, and write those within a text twice",
    ),
    (
        "image_text_jsonl",
        written("a.csv", "image,caption,caption\na.jpg,x,y\n"),
        "{tmp}/a.csv: has the column 'caption' twice; keep one of them",
    ),
    ("image_text_folder", folder(), "'{tmp}/p' has no image; expected .jpg, .png, .jpeg, .webp, .bmp, .gif, .tif, .tiff files"),
    (
        "image_text_folder",
        folder("a.jpg", "b.jpg"),
        "'{tmp}/p' has no caption for its 2 images; expected a .txt file beside each (first: a.txt), or captions.jsonl with {{\"image\": path, \"caption\": text}} a line",
    ),
    ("image_text_folder", folder("a.jpg", "captions.jsonl", "metadata.jsonl"), "'{tmp}/p' has captions.jsonl and metadata.jsonl; keep one of them"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("builder", "make", "message"),
    MISTAKES,
    ids=lambda part: part[:40] if isinstance(part, str) else "",
)
def test_messages_for_invalid_data(tmp_path, builder, make, message):
    info = make(tmp_path)
    cfg = section(builder, info["storage"])
    cfg.build_info.update(info)
    (problem,) = registry.get_builder_class(builder).preflight(cfg, "datasets.own")
    wanted = message.replace("{tmp}", str(tmp_path)).replace("{{", "{").replace("}}", "}")
    assert problem == Problem("datasets.own.build_info.storage", wanted)


# processors


def fussy(item):
    """A user's own processor, of images and of texts, with a mistake in it."""
    if item == "boom" or getattr(item, "width", 0) == 9:
        raise IndexError("list index out of range")
    return torch.zeros(3, 8, 8) if isinstance(item, Image.Image) else BlipCaptionProcessor()(item)


@pytest.mark.parametrize(
    ("name", "text", "reason", "detail"),
    [
        ("a.jpg", "boom", "bad_record", "IndexError: list index out of range (test_own_data_mis"),
        ("a.jpg", (("Why?", "boom"),), "bad_record", "IndexError: list index out of range ("),
        ("b.jpg", "A dog.", "bad_record", "IndexError: list index out of range (test_own_data_mis"),
        ("a.jpg", "!!! ... :)", "bad_caption", "the text processor leaves nothing of '!!! ... :)'"),
        ("a.jpg", (("Why?", "Ok."), ("Is it?", "!")), "bad_caption", "the text processor leaves"),
    ],
)
def test_a_processor_that_fails_or_leaves_nothing_costs_one_sample(
    tmp_path, name, text, reason, detail, caplog
):
    write_images(tmp_path, "a.jpg")
    (tmp_path / "b.jpg").write_bytes(jpeg(1, size=(9, 9)))
    records = [Record("1", "a.jpg", "A cat."), Record("2", name, text)]
    dataset = ImageTextDataset(records, tmp_path, fussy, fussy, "own")
    assert [sample["text_input"] for sample in dataset.one_pass()] == ["a cat"]
    assert dataset.skips.report() == {"seen": 2, reason: 1}
    assert f"own: skipped 2: {reason} ({detail}" in caplog.text
