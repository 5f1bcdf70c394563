"""The map-style dataset of images in a folder and captions in a JSON file."""

import pytest
import torch
from PIL import Image

from minigpt4.datasets.datasets.caption_datasets import read_annotations
from minigpt4.datasets.datasets.skips import PROBATION, DataError
from minigpt4.processors import Blip2ImageEvalProcessor
from tests.datasets.shards import folder_dataset, loader


def test_a_record_gives_image_raw_caption_and_image_number(tmp_path):
    dataset = folder_dataset(tmp_path, [7, 3])
    assert len(dataset) == 2
    sample = dataset[1]
    assert sample["image"].shape == (3, 8, 8)
    assert (sample["text_input"], sample["image_id"], sample["sample_id"]) == ("Caption 3.", 1, "3")
    with pytest.raises(IndexError):
        dataset[2]


def test_duplicate_annotations_share_a_number(tmp_path):
    annotations = [
        {"image_id": name, "caption": str(n)} for n, name in enumerate(["1", "0", "1", 0])
    ]
    dataset = folder_dataset(tmp_path, range(2), annotations)
    assert [dataset[n]["image_id"] for n in range(4)] == [0, 1, 0, 1]
    assert [dataset[n]["text_input"] for n in range(4)] == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("suffix", "kind"), [("jpg", "PNG"), ("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")]
)
def test_image_suffixes(tmp_path, suffix, kind):
    dataset = folder_dataset(tmp_path, [0])
    (tmp_path / "image" / "0.jpg").unlink()
    Image.new("RGB", (9, 9), "red").save(tmp_path / "image" / f"0.{suffix}", kind)
    assert dataset[0]["image"].shape == (3, 8, 8)


def test_an_unusable_image_is_counted_and_replaced_by_the_next_one(tmp_path):
    dataset = folder_dataset(tmp_path, range(4), processor=Blip2ImageEvalProcessor(image_size=8))
    (tmp_path / "image" / "1.jpg").write_bytes(b"no image")
    (tmp_path / "image" / "2.jpg").unlink()
    sample = dataset[1]
    assert sample["sample_id"] == "3"
    assert sample["text_input"] == "Caption 3."
    assert torch.equal(sample["image"], dataset[3]["image"])
    assert dataset.skips.report() == {"seen": 4, "bad_image": 1, "missing_file": 1}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_no_usable_image_at_all_ends_the_run(tmp_path, num_workers):
    dataset = folder_dataset(tmp_path, range(3))
    for number in range(3):
        (tmp_path / "image" / f"{number}.jpg").unlink()
    with pytest.raises(
        DataError, match=r"^cc_sbu_align: 3 of the first 3 samples were unusable \(3 missing_file; "
    ):
        next(loader([dataset], num_workers=num_workers))


def test_more_bad_images_than_the_limit_end_the_run(tmp_path):
    dataset = folder_dataset(tmp_path, range(10))
    (tmp_path / "image" / "4.jpg").write_bytes(b"broken")
    batches = loader([dataset], batch_size=10, max_bad_fraction=0.08)
    with pytest.raises(
        DataError, match=r"^cc_sbu_align: \d+\.\d% of 10\d\d samples were unusable \(limit 8%"
    ):
        for _ in range(PROBATION):
            next(batches)


@pytest.mark.parametrize("image_id", ["../secret", "/etc/passwd", "a/../../secret", "", "."])
def test_an_image_id_cannot_leave_the_folder(tmp_path, image_id):
    with pytest.raises(ValueError, match=r"record 1: image_id '.*' leads out of the image folder"):
        folder_dataset(
            tmp_path,
            [0],
            [{"image_id": "0", "caption": "a"}, {"image_id": image_id, "caption": "b"}],
        )


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    dataset = folder_dataset(tmp_path, range(2))
    outside = tmp_path / "outside.jpg"
    (tmp_path / "image" / "0.jpg").rename(outside)
    (tmp_path / "image" / "0.jpg").symlink_to(outside)
    assert dataset[0]["sample_id"] == "1"
    assert dataset.skips.report() == {"seen": 2, "bad_image": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"not valid JSON in UTF-8 \(Expecting property name"),
        ("[]", r'found list; expected \{"annotations": \['),
        ('{"images": [], "info": 1}', r"found images, info; expected"),
        ('{"annotations": []}', r"'annotations' is empty; expected at least one record"),
        (
            '{"annotations": [{"image_id": "1", "caption": "a"}, 5]}',
            r"record 1 is 5; expected a mapping",
        ),
        (
            '{"annotations": [{"caption": "a"}]}',
            r"record 0: 'image_id' is None; expected text or a number",
        ),
        ('{"annotations": [{"image_id": true, "caption": "a"}]}', r"record 0: 'image_id' is True"),
        (
            '{"annotations": [{"image_id": 3, "caption": null}]}',
            r"record 0: 'caption' is None; expected text",
        ),
    ],
)
def test_annotations_are_checked_record_by_record(tmp_path, content, message):
    path = tmp_path / "filter_cap.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"filter_cap\.json: {message}"):
        read_annotations(path)


def test_a_record_may_have_its_own_instruction(tmp_path):
    records = [
        {"image_id": "0", "caption": "Red.", "instruction": "Which colour?"},
        {"image_id": "0", "caption": "A."},
    ]
    dataset = folder_dataset(tmp_path, [0], records)
    assert dataset[0]["turns"] == (("Which colour?", "Red."),)
    assert dataset[1]["text_input"] == "A." and "turns" not in dataset[1]
    (tmp_path / "bad.json").write_text(
        '{"annotations": [{"image_id": "0", "caption": "Red.", "instruction": 3}]}'
    )
    with pytest.raises(ValueError, match="record 0: 'instruction' is 3; expected text"):
        read_annotations(tmp_path / "bad.json")
