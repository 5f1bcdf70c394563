"""Unusual records give the same sample from a tar, a folder, JSON lines and a table."""

import csv
import json
import logging
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4.datasets.datasets.record_text import MAX_CHARS, read_members, read_text
from minigpt4.datasets.datasets.skips import DataError, SkipSample
from tests.datasets.shards import folder_dataset, jpeg, write_tar
from tests.datasets.test_own_data import build


def llava_messages(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def messages(*texts):
    return [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(texts)
    ]


RED = (("Which colour?", "Red."),)
# (record or the bytes of its JSON, text file beside the image or None, the sample's text or the reason of its skip)
ODDITIES = {
    "caption": ({"caption": "Red."}, None, "Red."),
    "text": ({"text": "Red."}, None, "Red."),
    "caption before text": ({"text": "Blue.", "caption": "Red."}, None, "Red."),
    "a null caption is none": ({"caption": None, "text": "Red."}, None, "Red."),
    "a blank caption is none": ({"caption": " \n", "text": "Red."}, None, "Red."),
    "NaN is none": (b'{"caption": NaN, "text": "Red."}', None, "Red."),
    "a number": ({"caption": 7}, None, "bad_caption"),
    "infinity": (b'{"caption": Infinity}', None, "bad_caption"),
    "nothing but null": ({"caption": None}, None, "bad_caption"),
    "no caption": ({"title": "Red."}, None, "no_caption"),
    "blanks, byte order mark, line ends": (
        {"caption": "\ufeff  Red.\r\nBlue.\r\n "},
        None,
        "Red.\nBlue.",
    ),
    "half an emoji": ({"caption": "Red \ud83d"}, None, "Red \ufffd"),
    "both halves": (b'{"caption": "Red \\ud83d\\ude00"}', None, "Red \U0001f600"),
    "control characters": ({"caption": "Red\0\x1b[31m."}, None, "Red\0\x1b[31m."),
    "instruction": ({"caption": "Red.", "instruction": "Which colour?"}, None, RED),
    "instruction beside text": ({"text": "Red.", "instruction": " Which colour?\r\n"}, None, RED),
    "a null instruction": ({"caption": "Red.", "instruction": None}, None, "Red."),
    "an instruction that is a list": (
        {"caption": "Red.", "instruction": ["x"]},
        None,
        "bad_caption",
    ),
    "query and response": ({"query": "<image>Which colour?", "response": "Red."}, None, RED),
    "a history": (
        {"query": "And?", "response": "Red.", "history": [["a", "b"]]},
        None,
        "bad_record",
    ),
    "a system text": (
        {"query": "And?", "response": "Red.", "system": "Be brief."},
        None,
        "bad_record",
    ),
    "conversation": (
        {"conversations": llava_messages("<image>\nWhich colour?", "Red.")},
        None,
        RED,
    ),
    "conversation before caption": (
        {"caption": "B", "conversations": llava_messages("Which colour?", "Red.")},
        None,
        RED,
    ),
    "an empty conversation": ({"caption": "Red.", "conversations": []}, None, "Red."),
    "messages": ({"messages": messages("<image>Which colour?", "Red.")}, None, RED),
    "messages of two turns": (
        {"messages": messages("Which colour?", "Red.", "S?", "L")},
        None,
        (*RED, ("S?", "L")),
    ),
    "an empty system message": (
        {"messages": [{"role": "system", "content": ""}, *messages("Which colour?", "Red.")]},
        None,
        RED,
    ),
    "a system message": (
        {"messages": [{"role": "system", "content": "x"}, *messages("a", "b")]},
        None,
        "bad_record",
    ),
    "no answer": ({"messages": messages("Which colour?")}, None, "bad_caption"),
    "an answer of null": ({"messages": messages("Which colour?", None)}, None, "bad_caption"),
    "no message": ({"messages": [7, None]}, None, "bad_caption"),
    "a mark in an instruction": (
        {"caption": "Red.", "instruction": "<Image>\nWhich colour?"},
        None,
        RED,
    ),
    "2023's mark": (
        {"caption": "Red.", "instruction": "<Img><ImageHere></Img> Which colour?"},
        None,
        RED,
    ),
    "a path as mark": (
        {"caption": "Red.", "instruction": "<img>a/b.jpg</img>Which colour?"},
        None,
        RED,
    ),
    "a mark behind": ({"caption": "Red.", "instruction": "Which colour?\n<image>"}, None, RED),
    "a mark within": (
        {"caption": "Red.", "instruction": "In <image> what?"},
        None,
        (("In what?", "Red."),),
    ),
    "a mark in a caption": ({"caption": "<image>\nRed."}, None, "Red."),
    "nothing but a mark": ({"caption": "Red.", "instruction": "<image>"}, None, "Red."),
    "a caption of a mark": ({"caption": "<image>"}, None, "bad_caption"),
    "a mark of XML": ({"caption": "Red.", "instruction": "<image/>Which colour?"}, None, RED),
    "two marks": (
        {"caption": "Red.", "instruction": "<image> <ImageHere> Same?"},
        None,
        "bad_record",
    ),
    "a video": ({"caption": "Red.", "instruction": "<video>Which colour?"}, None, "bad_record"),
    "two images": ({"caption": "Red.", "images": ["0.jpg", "1.jpg"]}, None, "bad_record"),
    "no mapping": (b'["Red."]', None, "bad_record"),
    "no JSON": (b'{"caption": "Red', None, "bad_record"),
    "nested too deep": (b'{"caption": "Red.", "x": ' + b"[" * 100_000, None, "bad_record"),
    "a number of 9,999 digits": (
        b'{"caption": "Red.", "x": ' + b"9" * 9999 + b"}",
        None,
        "bad_record",
    ),
    "a question without end": (
        {"caption": "Red.", "instruction": "x" * (MAX_CHARS + 1)},
        None,
        "bad_caption",
    ),
    "a text file": (None, b"Red.", "Red."),
    "a text file of Windows": (None, b"\xef\xbb\xbfRed.\r\nBlue.\r\n", "Red.\nBlue."),
    "a pointer of Git LFS": (
        None,
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n",
        "bad_caption",
    ),
    "a blank text file": (None, b" \r\n", "bad_caption"),
    "a text file in UTF-16": (None, "Red.".encode("utf-16"), "bad_caption"),
    "the text file is the last choice": ({"caption": "Red."}, b"Blue.", "Red."),
    "a null caption and a text file": ({"caption": None}, b"Red.", "Red."),
    "an instruction and a text file": ({"instruction": "Which colour?"}, b"Red.\n", RED),
}


def found(dataset):
    """Return the text or turns of a dataset's only sample, or the reason why it was skipped."""
    for sample in dataset.one_pass():
        return sample.get("turns") or sample["text_input"]
    (reason,) = dataset.skips.report().keys() - {"seen"}
    return reason


@pytest.mark.parametrize("name", ODDITIES)
def test_a_record_is_the_same_sample_everywhere(tmp_path, name):
    record, beside, expected = ODDITIES[name]
    content = json.dumps(record).encode() if isinstance(record, dict) else record
    # a tar
    members = {"jpg": jpeg(0), "json": content, "txt": beside}
    members = {kind: data for kind, data in members.items() if data is not None}
    write_tar(tmp_path / "0.tar", {"0": members})
    assert found(build("webdataset", tmp_path / "0.tar")) == expected
    # a folder with a captions file or a text
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    if beside is not None:
        (tmp_path / "0.txt").write_bytes(beside)
    if record is None:
        assert found(build("image_text_folder", tmp_path)) == expected
        return
    # with a valid line beside it: a file without one is rejected as a whole
    line = (
        content.replace(b"{", b'{"image": "0.jpg", ', 1) if b'"images"' not in content else content
    )
    (tmp_path / "captions.jsonl").write_bytes(line + b'\n{"image": "0.jpg", "caption": "Sound."}')
    for builder, storage in (
        ("image_text_folder", tmp_path),
        ("image_text_jsonl", tmp_path / "captions.jsonl"),
    ):
        dataset = build(builder, storage)
        dataset.annotation = dataset.annotation[:1]
        assert found(dataset) == expected


def is_text(value):
    return isinstance(value, str) and value.isprintable()


IN_TABLES = [
    name
    for name, (record, _, _) in ODDITIES.items()
    if type(record) is dict and all(map(is_text, record.values()))
]
OF_2023 = [
    name
    for name, (record, _, _) in ODDITIES.items()
    if type(record) is dict and is_text(record.get("caption"))
]


@pytest.mark.parametrize(
    "name", [name for name in IN_TABLES if not str(ODDITIES[name][2]).startswith(("bad_", "no_"))]
)
def test_a_row_of_a_table_is_the_same_sample(tmp_path, name):
    record, beside, expected = ODDITIES[name]
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    if beside is not None:
        (tmp_path / "0.txt").write_bytes(beside)
    with open(tmp_path / "t.csv", "w", newline="") as file:
        csv.writer(file).writerows([["image", *record], ["0.jpg", *record.values()]])
    assert found(build("image_text_jsonl", tmp_path / "t.csv")) == expected


@pytest.mark.parametrize(
    "name", [name for name in OF_2023 if name != "an instruction that is a list"]
)
def test_a_record_of_cc_sbu_align_is_the_same_sample(tmp_path, name):
    record, _, expected = ODDITIES[name]
    try:
        assert found(folder_dataset(tmp_path, [0], [{"image_id": "0", **record}])) == expected
    except DataError as error:  # the only sample cannot be used
        assert expected in str(error)


def test_tables_with_blanks_and_too_many_fields(tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    (tmp_path / "t.csv").write_text(
        "image, caption\na.jpg, Red.\na.jpg,Red, and blue.\na.jpg,Blue.,,\n\na.jpg\n"
    )
    dataset = build("image_text_jsonl", tmp_path / "t.csv")
    texts = [
        (record.text if hasattr(record, "text") else record.reason) for record in dataset.annotation
    ]
    assert texts == ["Red.", "bad_record", "Blue.", "no_caption"]
    assert "has 3 fields, the first line 2" in dataset.annotation[1].detail


def test_long_texts_are_cut_before_they_are_tokenized():
    start = time.monotonic()
    assert len(read_text({"caption": "word " * 10_000_000})) == MAX_CHARS  # 50 MB
    turns = read_text({"conversations": llava_messages("Why?", "x" * 40_000) * 100})
    assert (
        len(turns) == 3
        and sum(len(question) + len(answer) for question, answer in turns) == MAX_CHARS
    )
    assert time.monotonic() - start < 5


def test_a_record_is_logged_in_one_short_line(tmp_path, caplog):
    record = {"caption": 7, "\x1b[31m\n" + "k" * 5000: 1}
    write_tar(
        tmp_path / "0.tar",
        {"a\nb": {"jpg": jpeg(0), "json": json.dumps({"x\x1b[31m\n" + "k" * 5000: 1}).encode()}},
    )
    with caplog.at_level(logging.WARNING):
        assert found(build("webdataset", tmp_path / "0.tar")) == "no_caption"
    (line,) = [line for line in caplog.messages if "skipped" in line]
    assert line.isprintable() and len(line) < 1000 and r"a\nb" in line and r"x\x1b[31m\nkkk" in line
    with pytest.raises(SkipSample):
        read_text(record)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.floats()
    | st.text(st.characters(exclude_categories=()))
    | st.just("<image>"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["from", "value", "role", "content"]), inner, max_size=3)
    ),
    max_leaves=12,
)
KEYS = st.sampled_from(
    ["caption", "text", "instruction", "query", "response", "conversations", "messages", "images"]
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=4), st.none() | st.binary(max_size=20))
def test_any_record_gives_text_that_can_be_encoded_or_is_skipped(record, beside):
    members = {"json": json.dumps(record).encode()} | ({} if beside is None else {"txt": beside})
    try:
        text = read_members(members)
    except SkipSample as skipped:
        assert skipped.detail.isprintable() and len(skipped.detail) < 2000
        return
    texts = [text] if isinstance(text, str) else [part for turn in text for part in turn]
    assert texts and all(texts)
    "".join(texts).encode("utf-8")
