"""Data that is damaged in one known way each; all of it is small and real.

A maker is called with a Place and returns the settings that lead a run to what it made.
"""

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.survival.s3_server import put

STORAGE, ALIGN = "datasets.laion.build_info.storage", "datasets.cc_sbu_align.build_info.storage"
ODD_ONE = 4  # of the 9 samples of a shard; not the last one that is drawn, so it is met in the first 8 good ones


class Place(NamedTuple):
    """Where a row works: a folder of its own, a web server, and a run that has ended well, to be copied."""

    folder: Path
    address: str
    finished: Callable[[], Path]


Maker = Callable[[Place], dict]


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def encoded(
    form: str = "JPEG",
    size: tuple[int, int] = (48, 40),
    mode: str = "RGB",
    seed: int = 0,
    **options,
) -> bytes:
    """Return the bytes of an image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def png(image: Image.Image) -> bytes:
    """Return the bytes of an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def sixteen_bits() -> bytes:
    """Return a PNG of 16 bits a pixel."""
    return png(Image.fromarray(np.full((40, 48), 40_000, dtype=np.uint16)))


def sideways() -> bytes:
    """Return a JPEG that EXIF says to turn."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    return encoded(exif=exif)


def bomb() -> bytes:
    """Return a small PNG of 70 million pixels."""
    return png(Image.new("1", (70_000, 1_000)))


def record(caption: str) -> bytes:
    """Return the JSON member of a sample."""
    return json.dumps({"caption": caption}).encode()


def good(number: int) -> dict[str, bytes]:
    """Return the members {extension: bytes} of a good sample."""
    return {"jpg": encoded(seed=number), "json": record(f"image {number} of a red circle")}


def write_tar(path: Path, samples: dict[str, dict[str, bytes | str]]) -> Path:
    """Write {key: {extension: bytes, or the target of a symbolic link as text}}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                if isinstance(data, str):
                    info.type, info.linkname, data = tarfile.SYMTYPE, data, b""
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def good_shards(folder: Path, number: int = 3, samples: int = 4) -> str:
    """Write shards of good samples; return their pattern."""
    for shard in range(number):
        first = shard * samples
        write_tar(
            folder / f"{shard:05}.tar",
            {f"{key:06}": good(key) for key in range(first, first + samples)},
        )
    return f"{folder}/{{00000..{number - 1:05}}}.tar"


def shards(
    change: Callable[[Path], object] | None = None,
    number: int = 3,
    samples: int = 4,
    storage: str | None = None,
) -> Maker:
    """Shards of good samples; `change(path)` damages the second, `storage` is named below the folder instead."""

    def make(place):
        pattern = good_shards(place.folder / "data", number, samples)
        if change:
            change(place.folder / "data/00001.tar")
        return {STORAGE: storage.format(folder=place.folder / "data") if storage else pattern}

    return make


def cut_at(part: float) -> Callable[[Path], object]:
    """Leave the first `part` of a file."""
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


def cut_in_image(path: Path) -> None:
    """Cut a shard within the bytes of an image."""
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"000006.jpg") + 700])


def cut_before(name: str) -> Callable[[Path], object]:
    """Cut a shard before the header of a member."""

    def cut(path):
        content = path.read_bytes()
        path.write_bytes(content[: content.index(name.encode())])

    return cut


def flip_in_header(path: Path) -> None:
    """Change one bit of a member's name."""
    content = bytearray(path.read_bytes())
    content[content.index(b"000007.jpg")] ^= 1
    path.write_bytes(content)


def written(content: bytes) -> Callable[[Path], object]:
    """Put `content` in place of a file's."""
    return lambda path: path.write_bytes(content)


def a_folder(path: Path) -> None:
    """Put a folder in place of a file."""
    path.unlink()
    path.mkdir()


def sample(change: Callable[[dict, Place], dict], key: str = f"{ODD_ONE:06}") -> Maker:
    """One shard of 9 samples; `change(members, place)` returns what becomes of one; `key`: its name in the tar."""

    def make(place):
        name_of_odd = key.format(folder=place.folder)
        samples = {f"{number:06}": good(number) for number in range(9)}
        members = change(samples[f"{ODD_ONE:06}"], place)
        samples = {
            name_of_odd if int(name) == ODD_ONE else name: value for name, value in samples.items()
        }
        samples[name_of_odd] = members
        return {STORAGE: str(write_tar(place.folder / "data/00000.tar", samples))}

    return make


def with_members(**members: bytes | str | None) -> Maker:
    """One sample has other members; None: it lacks one."""

    def change(before, _):
        return {name: data for name, data in (before | members).items() if data is not None}

    return sample(change)


def with_pickle(extension: str) -> Maker:
    """One sample has a member that runs code where it is unpickled."""
    return sample(
        lambda members, place: members | {extension: pickle.dumps(Trap(place.folder / "executed"))}
    )


def unusable(place: Place) -> dict:
    """One shard of 5 samples without an image that can be read."""
    samples = {f"{number:06}": good(number) | {"jpg": b"no image"} for number in range(5)}
    return {STORAGE: str(write_tar(place.folder / "data/00000.tar", samples))}


def captions(*shards_of_captions: list[str]) -> Maker:
    """Shards whose samples have these captions."""

    def make(place):
        for shard, texts in enumerate(shards_of_captions):
            samples = {
                f"{shard}{number:05}": good(number) | {"json": record(t)}
                for number, t in enumerate(texts)
            }
            write_tar(place.folder / f"data/{shard:05}.tar", samples)
        return {STORAGE: f"{place.folder}/data/{{00000..{len(shards_of_captions) - 1:05}}}.tar"}

    return make


def from_web(kind: str) -> Maker:
    """Two good shards, and one from the web server that behaves as `kind` says."""

    def make(place):
        address = (
            place.address.replace("http://", "http://reader:pass-word@")
            + f"/{kind}/{place.folder.name}.tar"
        )
        return {STORAGE: [good_shards(place.folder / "data", 2), f"{address}?token=to-ken"]}

    return make


def from_s3(kind: str, **settings) -> Maker:
    """Two good shards of an S3 server, and one of its bucket `kind`; `settings` of the run, with {folder}."""

    def make(place):
        good_shards(place.folder / "data")
        address, name = os.environ["AWS_ENDPOINT_URL"], place.folder.name
        shards = [
            put(address, f"{bucket}/{name}/{number:05}.tar", place.folder / f"data/{number:05}.tar")
            for number, bucket in enumerate(("good", "good", kind))
        ]
        if kind == "404":
            shards[-1] = f"s3://good/{name}/none.tar"
        named = {
            f"run.{key}": str(value).format(folder=place.folder) for key, value in settings.items()
        }
        return {STORAGE: shards, **named}

    return make


def align(
    change: Callable[[Path], object] | None = None, records: list[dict] | None = None
) -> Maker:
    """A folder of 8 images with captions; `change(folder)` damages it, `records` go into filter_cap.json."""

    def make(place):
        folder = place.folder / "align"
        (folder / "image").mkdir(parents=True)
        for number in range(8):
            (folder / f"image/{number}.jpg").write_bytes(encoded(seed=number))
        good_ones = [
            {"image_id": str(number), "caption": f"Image {number}."} for number in range(8)
        ]
        (folder / "filter_cap.json").write_text(json.dumps({"annotations": records or good_ones}))
        if change:
            change(folder)
        return {ALIGN: str(folder)}

    return make


def link_out(folder: Path) -> None:
    """Put a link to a file outside of the folder in place of an image."""
    (folder.parent / "outside.jpg").write_bytes(encoded())
    (folder / "image/3.jpg").unlink()
    (folder / "image/3.jpg").symlink_to(folder.parent / "outside.jpg")


def locked(relative: str, make: Maker) -> Maker:
    """After `make` nobody may read or write what lies there; the row drops root's privilege to do so all the same."""

    def lock(place):
        settings = make(place)
        path = place.folder / relative
        if not path.exists():
            path.mkdir()
        path.chmod(0)
        return settings

    return lock
