"""Wrong annotation files of MiniGPT-v2's datasets: faults that are counted per record, files that are rejected, messages."""

import json
import pickle

import pytest

from minigpt4.common.registry import registry
from minigpt4.datasets.datasets.annotations import Fault
from tests.datasets.instruction_files import (
    CAPTIONS,
    INSTANCES,
    MORE_TURNS,
    QUESTIONS,
    REFS,
    REGION,
    ROWS,
    SPLIT_ROWS,
    TEXTS,
    TURNS,
    build,
    name_of,
    preflight,
    write_images,
    write_json,
    write_refs,
)


def info_of(name, tmp_path, content=None):
    """Return the `build_info` of a dataset with an annotation file of `content`, and images beside it."""
    write_images(tmp_path / "coco")
    path = (
        str(write_json(tmp_path / "a.json", content))
        if content is not None
        else f"{tmp_path}/a.json"
    )
    if name in SPLIT_ROWS:
        return {
            "annotations": {"train": {"storage": path}},
            "images": {"storage": f"{tmp_path}/coco"},
        }
    images = {} if name == "unnatural_instruction" else {"image_path": f"{tmp_path}/coco"}
    if "refcoco" in name:
        return {**images, "ann_path": str(tmp_path), "dataset": "refcoco", "splitBy": "unc"}
    return {**images, "ann_path": path}


def turns(*values):
    """Return a row of a LLaVA file with these texts as alternating messages."""
    messages = [
        {"from": ("human", "gpt")[number % 2], "value": value}
        for number, value in enumerate(values)
    ]
    return {"id": "000000000001", "conversations": messages}


CHANGED = {"image": name_of(1), "question": "What?", "question_id": 1, "answer": ["x"]}
BOXED = {"image_id": name_of(1)[:-4], "phrase": "boat", "bbox": "{<1><2><3><4>}"}
COVER = {"split": 1, "imageURL": "http://x.test/a.jpg", "questions": ["Who?"], "answers": ["Ann."]}

# one broken row after a good one: (dataset, the row, reason, detail)
ROWS_WITH_FAULTS = [
    ("coco_caption", [1], "bad_record", "is list, not a mapping"),
    (
        "coco_caption",
        {"image": "train2014/a.jpg"},
        "bad_record",
        "'caption' is missing (there are: image)",
    ),
    (
        "coco_caption",
        {"image": "train2014/a.jpg", "caption": " "},
        "bad_caption",
        "'caption' is empty",
    ),
    ("coco_caption", {"image": 7, "caption": "x"}, "bad_record", "'image' is int, not text"),
    (
        "textcaps_caption",
        {"image_id": None, "caption_str": "x"},
        "bad_record",
        "'image_id' is None; expected a number or text",
    ),
    (
        "coco_vqa",
        {**CHANGED, "answer": []},
        "bad_record",
        "'answer' is an empty list; expected a list of texts",
    ),
    ("coco_vqa", {**CHANGED, "answer": ["x", 3]}, "bad_record", "'answer' is int, not text"),
    (
        "coco_vqa",
        {**CHANGED, "question_id": True},
        "bad_record",
        "'question_id' is True; expected a number or text",
    ),
    ("coco_vqa", CHANGED, "bad_record", "question_id 1 is there twice; first: a.json record 0"),
    (
        "aok_vqa",
        CHANGED,
        "bad_record",
        "'direct_answers' is missing (there are: image, question, question_id, answer)",
    ),
    ("gqa", {**CHANGED, "answer": None}, "bad_record", "'answer' is NoneType, not text"),
    (
        "ocrvqa",
        {**COVER, "answers": []},
        "bad_record",
        "'answers' is an empty list; expected a list of texts",
    ),
    ("ocrvqa", {**COVER, "answers": ["a", "b"]}, "bad_record", "has 1 questions and 2 answers"),
    (
        "flickr_ObjectToPhrase",
        {**BOXED, "bbox": "{<1><2><3>}"},
        "bad_record",
        "the box {<1><2><3>} is none; expected {<x0><y0><x1><y1>}",
    ),
    (
        "flickr_ObjectToPhrase",
        {**BOXED, "bbox": "1, 2, 3, 4"},
        "bad_record",
        "no box in '<p>boat</p> 1, 2, 3, 4'; expected {<x0><y0><x1><y1>}",
    ),
    (
        "flickr_ObjectToPhrase",
        {**BOXED, "bbox": "{<1><2><300><4>}"},
        "bad_record",
        "the box {<1><2><300><4>} is out of range; expected 0 <= x0 <= x1 <= 100, y alike",
    ),
    (
        "flickr_ObjectToPhrase",
        {**BOXED, "bbox": "{<9><2><3><4>}"},
        "bad_record",
        "the box {<9><2><3><4>} is out of range; expected 0 <= x0 <= x1 <= 100, y alike",
    ),
    (
        "llava_detail",
        {"id": 1, "conversations": "hello"},
        "bad_record",
        "'conversations' has str; expected a question and an answer in turn",
    ),
    (
        "llava_detail",
        {"id": 1, "conversations": TURNS[:1]},
        "bad_record",
        "'conversations' has 1 messages; expected a question and an answer in turn",
    ),
    (
        "llava_detail",
        {"id": 1, "conversations": TURNS[::-1]},
        "bad_record",
        "message 0 is {'from': 'gpt', 'value': 'A boat.'}; expected {\"from\": \"human\", \"value\": text}",
    ),
    ("llava_conversation", turns("<image>\n", "A boat."), "bad_caption", "message 0 is empty"),
    (
        "llava_conversation",
        turns("What?", "A!@#B"),
        "bad_record",
        "has !@# in a text, which stands between turns: 'A!@#B'",
    ),
    (
        "llava_conversation",
        {"conversations": MORE_TURNS},
        "bad_record",
        "'id' is missing (there are: conversations)",
    ),
    (
        "unnatural_instruction",
        {"instances": []},
        "bad_record",
        "'instances' is []; expected a list of mappings",
    ),
    (
        "unnatural_instruction",
        {"instances": [{"output": "x"}]},
        "bad_record",
        "'instruction_with_input' is missing (there are: output)",
    ),
]
GOOD = {**ROWS, **SPLIT_ROWS, "unnatural_instruction": TEXTS}


@pytest.mark.parametrize(("name", "row", "reason", "detail"), ROWS_WITH_FAULTS)
def test_a_record_that_cannot_be_used_is_counted(tmp_path, caplog, name, row, reason, detail):
    rows = GOOD[name]["data"] if name == "textcaps_caption" else GOOD[name]
    if name == "ocrvqa":
        content, where = {**rows, "book": row}, "a.json record book"
    else:
        rows = [*rows, row]
        content = {"data": rows} if name == "textcaps_caption" else rows
        where = f"a.json record {len(rows) - 1}"
    info = info_of(name, tmp_path, content)
    assert preflight(name, info) == []
    dataset = build(name, info)["train"]
    (fault,) = [record for record in dataset.annotation if isinstance(record, Fault)]
    assert fault == (where, reason, detail)
    assert f"{name}: 1 of 9 records cannot be used; first: {where}: {reason}" in caplog.text
    assert dataset[8]["sample_id"] != where
    assert dataset.skips.report() == {"seen": 2, reason: 1}


REF = {"ann_id": 10, "image_id": 1, "split": "train", "sentences": [{"raw": "it"}]}
REFS_WITH_FAULTS = [
    (7, "bad_record", "is int, not a mapping"),
    (
        {**REF, "ann_id": 99},
        "bad_record",
        "ann_id 99 is not among the annotations of instances.json",
    ),
    ({**REF, "image_id": 99}, "no_image", "image_id 99 is not among the images of instances.json"),
    ({**REF, "image_id": 2}, "bad_record", "is about image 2, its box (ann_id 10) about image 1"),
    ({**REF, "sentences": []}, "no_caption", "'sentences' is empty"),
    (
        {**REF, "sentences": ["it"]},
        "bad_record",
        "'sentences' is ['it']; expected a list of mappings",
    ),
    (
        {**REF, "ann_id": 1001},
        "bad_record",
        "the box is [1, 2, 3]; expected four numbers: x, y, width, height",
    ),
    (
        {**REF, "ann_id": 1002},
        "bad_record",
        "the box [5, 5, 0, 3] is empty; expected a width and a height above 0",
    ),
    (
        {**REF, "ann_id": 1003},
        "bad_record",
        "the box is None; expected four numbers: x, y, width, height",
    ),
    (
        {**REF, "ann_id": 1004},
        "bad_record",
        "the box is [1, 2, nan, 3]; expected four numbers: x, y, width, height",
    ),
]
BAD_BOXES = [
    {"id": 1001, "image_id": 1, "bbox": [1, 2, 3]},
    {"id": 1002, "image_id": 1, "bbox": [5, 5, 0, 3]},
    {"id": 1003, "image_id": 1},
    {"id": 1004, "image_id": 1, "bbox": [1, 2, float("nan"), 3]},
]


@pytest.mark.parametrize(("ref", "reason", "detail"), REFS_WITH_FAULTS)
@pytest.mark.parametrize("name", ["refcoco", "invrefcoco"])
def test_a_ref_that_cannot_be_used_is_counted(tmp_path, name, ref, reason, detail):
    write_refs(
        tmp_path, [*REFS, ref], {**INSTANCES, "annotations": INSTANCES["annotations"] + BAD_BOXES}
    )
    dataset = build(name, info_of(name, tmp_path))["train"]
    assert dataset.annotation[-1] == ("refs(unc).p record 8", reason, detail)
    dataset[8]
    assert dataset.skips.report() == {"seen": 2, reason: 1}


def test_regions_of_visual_genome(tmp_path):
    write_images(tmp_path / "VG", ["1.jpg"])
    write_json(tmp_path / "image_data.json", [{"image_id": 1, "url": "https://x.test/VG/1.jpg"}])
    regions = [
        {
            "id": 1,
            "regions": [
                REGION,
                {**REGION, "width": 128, "height": 128},
                {**REGION, "phrase": ""},
                3,
            ],
        },
        {"id": 2, "regions": [REGION]},
        {"id": 1, "regions": []},
        {"id": 3, "regions": 5},
    ]
    write_json(tmp_path / "region_descriptions.json", regions)
    good, *faults = build("refvg", {"data_dir": str(tmp_path)})["train"].annotation
    where = "region_descriptions.json record"
    assert str(good.where) == f"{where} 1 of image 1"
    assert faults == [
        Fault(f"{where} 1 of image 1", "bad_caption", "'phrase' is empty"),
        Fault(f"{where} 3 of image 1", "bad_record", "is int, not a mapping"),
        Fault(f"{where} 1 of image 2", "no_image", "image 2 is not in image_data.json"),
        Fault(f"{where}s of image 3", "bad_record", "'regions' is int; expected a list"),
    ]


# files that are rejected as a whole

CAPTION = '{"image": "train2014/COCO_train2014_000000000009.jpg", "caption": text}'
QUESTION = '{"image": path, "question": text, "question_id": id, "answer": [text, ..]}'
BAD = "the download went wrong. Delete it and download it again"
REFUSED = [  # dataset, content of the file, message after the file's name
    (
        "coco_caption",
        "no JSON",
        "not valid JSON in UTF-8 (Expecting value: line 1 column 1 (char 0))",
    ),
    ("coco_caption", "", f"is empty: {BAD}"),
    ("coco_caption", "<html>404", f"is an HTML page, not annotations: {BAD}"),
    ("coco_caption", "[]", f"no record to train on; expected {CAPTION}"),
    (
        "coco_caption",
        {"images": 1, "info": 1},
        f"found a mapping with images, info; expected a list of {CAPTION}",
    ),
    ("coco_caption", "7", f"found int; expected a list of {CAPTION}"),
    (
        "coco_caption",
        [{"image": "val2014/a.jpg", "caption": "x"}],
        f"no record to train on; expected {CAPTION}",
    ),
    (
        "coco_vqa",
        CAPTIONS,
        "none of its 8 records can be used; a.json record 0: 'question' is missing (there are: image, caption, "
        f"image_id); expected {QUESTION}",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_a_file_that_is_rejected(tmp_path, name, content, message):
    (found,) = preflight(name, info_of(name, tmp_path, content))
    assert (
        found
        == f"datasets.{name}.build_info.annotations.train.storage: {tmp_path}/a.json: {message}"
    )


def test_a_missing_annotation_file(tmp_path):
    (tmp_path / "b.json").write_text("[]")
    (found,) = preflight("llava_detail", info_of("llava_detail", tmp_path))
    message = f"no file at '{tmp_path}/a.json' (the folder has b.json): docs/instruction_data.md"
    assert found == f"datasets.llava_detail.build_info.ann_path: {message}"


def test_the_other_split_by_is_named(tmp_path):
    write_refs(tmp_path, split_by="google")
    (found,) = preflight("refcoco", info_of("refcoco", tmp_path))
    message = f"no file at '{tmp_path}/refcoco/refs(unc).p' (the folder has refs(google).p): docs/instruction_data.md"
    assert found == f"datasets.refcoco.build_info.ann_path: {message}"


def test_the_url_of_a_missing_file_is_named(tmp_path):
    info = info_of("gqa", tmp_path)
    info["annotations"]["train"]["url"] = ["https://x.test/gqa.json"]
    (found,) = preflight("gqa", info)
    source = "; the release takes it from https://x.test/gqa.json: docs/instruction_data.md"
    assert (
        found
        == f"datasets.gqa.build_info.annotations.train.storage: no file at '{tmp_path}/a.json'{source}"
    )


def test_images_that_are_all_missing(tmp_path):
    info = info_of("coco_vqa", tmp_path, QUESTIONS)
    for image in (tmp_path / "coco").iterdir():
        image.unlink()
    (found,) = preflight("coco_vqa", info)
    first = f"no '{name_of(1)}' (a.json record 0) in '{tmp_path}/coco/train' or '{tmp_path}/coco'"
    assert (
        found
        == f"datasets.coco_vqa.build_info.images.storage: {first}, nor any other of 8 that were looked for"
    )
    with pytest.raises(
        ValueError, match=r"^datasets.coco_vqa: none of the images of its 8 records is in "
    ):
        build("coco_vqa", info)
    (tmp_path / "coco").rmdir()
    (found,) = preflight("coco_vqa", info)
    assert (
        found
        == f"datasets.coco_vqa.build_info.images.storage: no folder at '{tmp_path}/coco'; expected the images"
    )


def test_a_file_given_twice(tmp_path):
    info = info_of("coco_vqa", tmp_path, QUESTIONS)
    info["annotations"]["train"]["storage"] = [f"{tmp_path}/a.json"] * 2
    (found,) = preflight("coco_vqa", info)
    message = f"{tmp_path}/a.json: the file is given twice; its records would count double"
    assert found == f"datasets.coco_vqa.build_info.annotations.train.storage: {message}"


class Evil:
    """Its pickle calls a function when it is loaded."""

    def __reduce__(self):
        return print, ("this ran",)


@pytest.mark.parametrize(
    ("refs", "message"),
    [
        (b"no pickle", "not a pickle of REFER (invalid load key, 'n'.)"),
        (b"", "not a pickle of REFER (Ran out of input)"),
        (
            pickle.dumps([Evil()]),
            "not a pickle of REFER (names builtins.print, which could run code; expected plain lists and mappings)",
        ),
        (
            pickle.dumps({"refs": 1}),
            'found dict; expected [{"ref_id", "ann_id", "image_id", "split", "sentences"',
        ),
    ],
)
def test_a_pickle_that_is_rejected(tmp_path, capsys, refs, message):
    write_refs(tmp_path, refs)
    (found,) = preflight("refcoco", info_of("refcoco", tmp_path))
    assert found.startswith(
        f"datasets.refcoco.build_info.ann_path: {tmp_path}/refcoco/refs(unc).p: {message}"
    )
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("instances", "message"),
    [
        ({"images": []}, "found images; expected "),
        ({**INSTANCES, "images": [{"file": 1}]}, "record 0 is {'file': 1}; expected "),
        (
            {
                **INSTANCES,
                "annotations": [
                    *INSTANCES["annotations"],
                    {"id": 10, "image_id": 2, "bbox": [1, 1, 2, 2]},
                ],
            },
            "'id' 10 is there twice, with different content; keep one of them",
        ),
    ],
)
def test_instances_that_are_rejected(tmp_path, instances, message):
    write_refs(tmp_path, instances=instances)
    (found,) = preflight("refcoco", info_of("refcoco", tmp_path))
    assert found.startswith(
        f"datasets.refcoco.build_info.ann_path: {tmp_path}/refcoco/instances.json: {message}"
    )


def test_keys_of_another_layout_are_rejected_by_name(tmp_path):
    cls = registry.get_builder_class("gqa")
    with pytest.raises(ValueError, match=r"datasets.gqa.build_info.ann_path: unknown key"):
        cls({"build_info": {"ann_path": str(tmp_path), "image_path": str(tmp_path)}})
    assert json.loads(json.dumps(REFS)) == REFS


@pytest.mark.parametrize("storage", [[], 5, [5], [" "]])
def test_a_storage_that_names_no_file_is_refused_before_the_run(storage, tmp_path):
    info = info_of("gqa", tmp_path)
    info["annotations"]["train"]["storage"] = storage
    assert preflight("gqa", info) == [
        f"datasets.gqa.build_info.annotations.train.storage: {storage}; expected the path of an annotation file, "
        "or a list of such paths"
    ]
