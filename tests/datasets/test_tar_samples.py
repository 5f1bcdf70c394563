"""The grouping of a tar's members into samples; no image is lost without being counted."""

import itertools
import random
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4.datasets.datasets import tar_samples as module
from minigpt4.datasets.datasets.tar_members import Member
from minigpt4.datasets.datasets.tar_samples import tar_samples


def samples(*names, error=None, size=1):
    """Return (pairs, incomplete samples), both as (key, extensions) in the order of the samples."""

    def members():
        for name in names:
            yield Member(
                name, bytes(size) if name.lower().endswith(("jpg", "png", "txt", "json")) else None
            )
        if error:
            raise error

    found = []
    try:
        for sample in tar_samples(members()):
            found.append((sample.key, sorted(sample.extensions), sample.is_pair()))
    except tarfile.ReadError as raised:
        assert raised is error
    pairs = [(key, extensions) for key, extensions, is_pair in found if is_pair]
    return pairs, [(key, extensions) for key, extensions, is_pair in found if not is_pair]


@pytest.mark.parametrize(
    "names, pairs, alone",
    [
        ("0.jpg 0.json 0.txt 1.jpg 1.txt", ["0", "1"], []),
        (
            "photo.00001.jpg photo.00001.txt photo.00002.jpg photo.00002.txt",
            ["photo.00001", "photo.00002"],
            [],
        ),
        ("IMG_2023.05.01.JPG IMG_2023.05.01.TXT 5.1.jpg 5.1.json", ["IMG_2023.05.01", "5.1"], []),
        ("./a.b/0.jpg ./a.b/0.txt /x/1.png /x/1.txt", ["./a.b/0", "/x/1"], []),
        # an accent as macOS writes it (NFD), and as other systems do (NFC)
        ("e\u0301.jpg \u00e9.txt", ["\u00e9"], []),
        # other members that begin with a pair's name belong to it, before or after it
        ("1.depth.png 1.jpg 1.mask.png 1.npy 1.txt 2.jpg 2.mask.png 2.txt", ["1", "2"], []),
        ("a.jpg a.txt a.1.jpg a.1.txt", ["a", "a.1"], []),
        ("d.jpg d.txt d.x/b.jpg ./d.jpg .jpg .txt", ["d", ""], ["d.x/b", "./d"]),
        # members that are not adjacent
        ("0.jpg 1.txt 2.jpg 0.txt 1.jpg 2.txt", ["0", "1", "2"], []),
        # duplicate names
        ("x.jpg x.txt x.jpg x.txt", ["x", "x"], []),
        ("x.jpg x.txt y.jpg y.txt x.jpg x.txt", ["x", "y", "x"], []),
        ("x.jpg x.jpg x.txt", ["x"], ["x"]),
        # without a partner
        ("1.input.jpg 1.output.txt", [], ["1.input", "1.output"]),
        ("0.jpg 1.txt 2.gif README 3.pkl", [], ["0", "1", "2", "README", "3"]),
        # no data
        (
            "0.jpg ._0.jpg __MACOSX/0.jpg d/__MACOSX/._0.txt .DS_Store __meta__ __m__/0.jpg 0.txt",
            ["0"],
            [],
        ),
        (".hidden.jpg .hidden.txt", [".hidden"], []),
    ],
)
def test_members_are_grouped_by_name(names, pairs, alone):
    found, lonely = samples(*names.split())
    assert sorted(key for key, _ in found) == sorted(pairs)
    assert sorted(key for key, _ in lonely) == sorted(alone)


def test_pairs_keep_the_order_of_the_archive():
    numbers = random.Random(0).sample(range(1000), 50)
    names = itertools.chain.from_iterable((f"{number}.jpg", f"{number}.txt") for number in numbers)
    assert [key for key, _ in samples(*names)[0]] == [str(number) for number in numbers]


def test_a_damaged_archive_gives_all_earlier_samples_except_the_last():
    names = ["lonely.jpg", "0.jpg", "0.txt", "1.jpg", "1.txt", "2.jpg"]
    assert samples(*names, error=tarfile.ReadError("cut")) == (
        [("0", ["jpg", "txt"]), ("1", ["jpg", "txt"])],
        [("lonely", ["jpg"])],
    )
    whole = samples(*names[:-1], error=module.BehindTheEndError("junk"))
    assert [key for key, _ in whole[0]] == ["0", "1"]


def test_waiting_samples_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "MAX_WAITING", 11_000)
    images = [f"{number}.jpg" for number in range(30)]
    captions = [f"{number}.txt" for number in range(30)]
    pairs, alone = samples(*images, *captions, size=100)
    lonely = [number for number in range(30) if (str(number), ["jpg"]) in alone]
    assert len(lonely) >= 20 and len(pairs) <= 10
    assert len(pairs) * 2 + len(alone) == 60


def test_the_memory_of_names_is_bounded_too(monkeypatch):
    monkeypatch.setattr(module, "MAX_WAITING", 20_000)
    taken = []

    def members():
        for number in range(100):
            taken.append(number)
            yield Member(f"{number}.cls", None)

    first = next(tar_samples(members()))
    assert first.key == "0" and len(taken) == 20


def test_a_sample_that_is_too_large_is_reported(monkeypatch):
    monkeypatch.setattr(module, "MAX_MEMBER", 10)
    (sample,) = tar_samples(
        [Member("0.jpg", bytes(8)), Member("0.txt", b"abc"), Member("0.png", None, "a link")]
    )
    assert sample.found() == (
        "jpg",
        "png (a link)",
        "txt (too large: a sample has at most 10 bytes)",
    )


def test_an_incomplete_sample_with_dots_in_its_name_is_explained():
    (sample,) = tar_samples([Member("photo.1.jpg", b"")])
    assert sample.found() == ("jpg", "alone: a sample's members have one name up to the last dot")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c", "d.e"]), st.sampled_from(["jpg", "txt", "json", "npy"])
        )
    )
)
def test_no_image_is_lost(members):
    pairs, alone = samples(*(f"{key}.{extension}" for key, extension in members))
    images = [key for key, extension in members if extension == "jpg"]
    assert sorted(images) == sorted(key for key, extensions in pairs + alone if "jpg" in extensions)
