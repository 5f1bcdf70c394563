"""Unusual paths: of Windows, of macOS, through links, with brackets, not UTF-8."""

import json
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from minigpt4.common.image_files import find_file, list_files
from tests.datasets.shards import folder_dataset, jpeg
from tests.datasets.test_own_data import build, preflight, write_images

ACCENT = unicodedata.normalize("NFC", "é.jpg")
WRITTEN = {  # (path of the file, path in the record)
    r"a\b.jpg": ("a/b.jpg", r"a\b.jpg"),
    "blanks around": ("a.jpg", " a.jpg "),
    "NFD on disk": (unicodedata.normalize("NFD", ACCENT), ACCENT),
    "NFC on disk": (ACCENT, unicodedata.normalize("NFD", ACCENT)),
    "capitals on disk": ("a.JPG", "a.jpg"),
    "capitals in the record": ("a.jpg", "a.JPG"),
    "dots that stay inside": ("a/b.jpg", "c/../a/./b.jpg"),
    "brackets": ("set[1]/{a}.jpg", "set[1]/{a}.jpg"),
    "a backslash on disk": (r"a\b.jpg", r"a\b.jpg"),
    "a name that is not UTF-8": (os.fsdecode(b"\xe9.jpg"), os.fsdecode(b"\xe9.jpg")),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_intended_file_is_found(tmp_path, name):
    file, written = WRITTEN[name]
    write_images(tmp_path, file)
    (tmp_path / "own.jsonl").write_text(json.dumps({"image": written, "caption": "Red."}))
    assert preflight("image_text_jsonl", tmp_path / "own.jsonl") == []
    assert build("image_text_jsonl", tmp_path / "own.jsonl")[0]["text_input"] == "Red."


def test_the_label_of_a_name_that_is_not_utf_8_is_utf_8(tmp_path):
    file = os.fsdecode(b"\xe9\n.jpg")
    write_images(tmp_path, file)
    (tmp_path / file).with_suffix(".txt").write_text("Red.")
    dataset = build("image_text_folder", tmp_path)
    dataset.set_split(False, 1e-9)
    assert dataset[0]["sample_id"] == r"\udce9\n.jpg" and dataset.fingerprint


@pytest.mark.parametrize("name", WRITTEN)
def test_a_captions_file_or_a_text_file_is_matched_to_the_intended_image(tmp_path, name):
    file, written = WRITTEN[name]
    write_images(tmp_path, file)
    stem, suffix = os.path.splitext(os.path.normpath(written.strip()))
    text = tmp_path / (
        stem.replace("\\", "/" if "/" in file else "\\") + (".TXT" if suffix.isupper() else ".txt")
    )
    text.write_text("Red.")
    assert build("image_text_folder", tmp_path)[0]["text_input"] == "Red."
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image": written, "caption": "Blue."}))
    dataset = build("image_text_folder", tmp_path)
    assert len(dataset) == 1 and dataset[0]["text_input"] == "Blue."


def test_absolute_paths_through_links(tmp_path):
    write_images(tmp_path / "disk", "a.jpg")
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    for place, images in (("data", "disk"), ("disk", "data"), ("data", "data")):
        (tmp_path / "own.jsonl").write_text(
            json.dumps({"image": str(tmp_path / place / "a.jpg"), "caption": "Red."})
        )
        where = {"images": str(tmp_path / images)}
        assert preflight("image_text_jsonl", tmp_path / "own.jsonl", **where) == []
        assert build("image_text_jsonl", tmp_path / "own.jsonl", **where)[0]["text_input"] == "Red."


def test_links_within_a_folder_give_no_duplicates_and_no_loops(tmp_path):
    write_images(tmp_path, "all/a.jpg", "aaa.jpg/b.bmp")  # a folder may be called aaa.jpg
    (tmp_path / "all/loop").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "all")
    (tmp_path / ".hidden").symlink_to("/")
    assert (
        list_files(tmp_path)
        == list_files(tmp_path, follow_out=True)
        == ["aaa.jpg/b.bmp", "all/a.jpg"]
    )
    assert (
        find_file(tmp_path, "again/a.jpg") == "again/a.jpg"
        and find_file(tmp_path, "aaa.jpg") is None
    )


def test_links_out_of_a_folder_are_rejected_or_followed_once(tmp_path):
    write_images(tmp_path / "far", "b.jpg")
    write_images(tmp_path / "data", "a.jpg")
    (tmp_path / "data/x").symlink_to(tmp_path / "far")
    (tmp_path / "far/back").symlink_to(tmp_path / "data")
    (tmp_path / "far/loop").symlink_to(tmp_path / "far")
    with pytest.raises(
        ValueError, match=rf"'x' is a link out of the folder, to '{tmp_path}/far' \(1 such links\)"
    ):
        list_files(tmp_path / "data")
    assert list_files(tmp_path / "data", follow_out=True) == ["a.jpg", "x/b.jpg"]


@pytest.mark.parametrize("kind", ["bmp", "gif", "tif", "tiff", "JPG"])
def test_every_suffix_is_read_by_every_builder_of_folders(tmp_path, kind):
    dataset = folder_dataset(tmp_path, [0])
    (tmp_path / "image/0.jpg").unlink()
    image = Image.fromarray(np.zeros((9, 9, 3), np.uint8))
    image.save(tmp_path / f"image/0.{kind}", {"tif": "TIFF", "JPG": "JPEG"}.get(kind, kind.upper()))
    assert dataset[0]["image_id"] == 0
    (tmp_path / "image/0.txt").write_text("Red.")
    assert build("image_text_folder", tmp_path / "image")[0]["text_input"] == "Red."


def test_filter_cap_without_images_is_found_before_training(tmp_path):
    folder_dataset(tmp_path, [0])
    assert preflight("cc_sbu_align", tmp_path) == []
    (tmp_path / "image/0.jpg").rename(tmp_path / "0.jpg")
    (problem,) = preflight("cc_sbu_align", tmp_path)
    assert f"'{tmp_path}/image' has no 0.jpg, nor any other of 1 that were looked for" in problem


def test_a_git_lfs_pointer_is_named_in_the_error(tmp_path):
    (tmp_path / "a.jpg").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 2\n"
    )
    (tmp_path / "b.jpg").write_bytes(jpeg(0))
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("Red.")
    dataset = build("image_text_folder", tmp_path)
    assert dataset[0]["sample_id"] == "b.jpg" and "Git LFS pointer" in dataset.skips.first
