"""Data and checkpoints that are damaged in one known way each; all of it is small and real.

A maker is called with a Place and returns the settings that lead a run to what it made.
"""

import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

STORAGE, ALIGN = "datasets.laion.build_info.storage", "datasets.cc_sbu_align.build_info.storage"
ODD_ONE = 4  # of the 9 samples of a shard; not the last one that is drawn, so it is met in the first 8 good ones


class Place(NamedTuple):
    """Where a row works: a folder of its own, a web server, and a run that has ended well, to be copied."""

    folder: Path
    address: str
    finished: object  # () -> Path


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def encoded(form="JPEG", size=(48, 40), mode="RGB", seed=0, **options):
    """Return the bytes of an image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def sixteen_bits():
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 48), 40_000, dtype=np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def sideways():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    return encoded(exif=exif)


def bomb():
    buffer = io.BytesIO()
    Image.new("1", (70_000, 1_000)).save(buffer, "PNG")
    return buffer.getvalue()


def record(caption):
    return json.dumps({"caption": caption}).encode()


def good(number):
    """Return the members {extension: bytes} of a good sample."""
    return {"jpg": encoded(seed=number), "json": record(f"image {number} of a red circle")}


def write_tar(path, samples):
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


def good_shards(folder, number=3, samples=4):
    """Write shards of good samples; return their pattern."""
    for shard in range(number):
        first = shard * samples
        write_tar(folder / f"{shard:05}.tar", {f"{key:06}": good(key) for key in range(first, first + samples)})
    return f"{folder}/{{00000..{number - 1:05}}}.tar"


# ---------------------------------------- makers


def shards(change=None, number=3, samples=4, storage=None):
    """Shards of good samples; `change(path)` damages the second, `storage` is named below the folder instead."""

    def make(place):
        pattern = good_shards(place.folder / "data", number, samples)
        if change:
            change(place.folder / "data/00001.tar")
        return {STORAGE: storage.format(folder=place.folder / "data") if storage else pattern}

    return make


def cut_at(part):
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])


def cut_in_picture(path):
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"000006.jpg") + 700])


def written(content):
    return lambda path: path.write_bytes(content)


def a_folder(path):
    path.unlink()
    path.mkdir()


def sample(change, key=f"{ODD_ONE:06}"):
    """One shard of 9 samples; `change(members)` returns what becomes of one of them, `key` its name in the tar.

    "{folder}" in `key` is the row's folder.
    """

    def make(place):
        name_of_odd = key.format(folder=place.folder)
        samples = {f"{number:06}": good(number) for number in range(9)}
        members = change(samples[f"{ODD_ONE:06}"], place)
        samples = {name_of_odd if int(name) == ODD_ONE else name: samples[name] for name in samples}
        samples[name_of_odd] = members
        return {STORAGE: str(write_tar(place.folder / "data/00000.tar", samples))}

    return make


def with_members(**members):
    """One sample has other members; None: it lacks one."""

    def change(before, _):
        return {name: data for name, data in (before | members).items() if data is not None}

    return sample(change)


def with_pickle(extension):
    return sample(lambda members, place: members | {extension: pickle.dumps(Trap(place.folder / "executed"))})


def unusable(place):
    """One shard of 5 samples without an image that can be read."""
    samples = {f"{number:06}": good(number) | {"jpg": b"no image"} for number in range(5)}
    return {STORAGE: str(write_tar(place.folder / "data/00000.tar", samples))}


def captions(*shards_of_captions):
    """Shards whose samples have these captions."""

    def make(place):
        for shard, texts in enumerate(shards_of_captions):
            samples = {f"{shard}{number:05}": good(number) | {"json": record(t)} for number, t in enumerate(texts)}
            write_tar(place.folder / f"data/{shard:05}.tar", samples)
        return {STORAGE: f"{place.folder}/data/{{00000..{len(shards_of_captions) - 1:05}}}.tar"}

    return make


def from_web(kind):
    """Two good shards, and one from the web server that behaves as `kind` says."""

    def make(place):
        address = place.address.replace("http://", "http://reader:pass-word@") + f"/{kind}/{place.folder.name}.tar"
        return {STORAGE: [good_shards(place.folder / "data", 2), f"{address}?token=to-ken"]}

    return make


def align(change=None, records=None):
    """A folder of 8 images with captions; `change(folder)` damages it, `records` go into filter_cap.json."""

    def make(place):
        folder = place.folder / "align"
        (folder / "image").mkdir(parents=True)
        for number in range(8):
            (folder / f"image/{number}.jpg").write_bytes(encoded(seed=number))
        found = [{"image_id": str(number), "caption": f"Image {number}."} for number in range(8)]
        (folder / "filter_cap.json").write_text(json.dumps({"annotations": records or found}))
        if change:
            change(folder)
        return {ALIGN: str(folder)}

    return make


def link_out(folder):
    (folder.parent / "outside.jpg").write_bytes(encoded())
    (folder / "image/3.jpg").unlink()
    (folder / "image/3.jpg").symlink_to(folder.parent / "outside.jpg")


def weights(change):
    """`model.ckpt`: the weights of a finished run after `change(state)`, which may return another object."""

    def make(place):
        import torch

        path = place.folder / "weights.pth"
        state = torch.load(newest(place.finished()), weights_only=True)
        torch.save(change(state) or state, path)
        return shards()(place) | {"model.ckpt": str(path)}

    return make


def a_nan(state):
    state["model"]["llama_proj.weight"][3, 5] = float("nan")


def narrow(state):
    state["model"] = {name: tensor[:64] for name, tensor in state["model"].items()}


def trap_as_weights(key):
    def make(place):
        path = place.folder / "weights.pth"
        path.write_bytes(pickle.dumps({"model": Trap(place.folder / "executed")}))
        return shards()(place) | {key: str(path)}

    return make


def resumed(change=None, **settings):
    """A copy of the finished run, gone on with for a second epoch; `change(checkpoints, oldest first)` damages it."""

    def make(place):
        shutil.copytree(place.finished(), place.folder / "out")
        if change:
            change(sorted(place.folder.glob("out/*/*.pth"), key=lambda path: len(path.name), reverse=True))
        return shards()(place) | {"run.resume_ckpt_path": "auto", "run.max_epoch": 2} | settings

    return make


def other_shards(place):
    more = shards(number=4)(place)
    return resumed()(place) | more


def damage_newest(paths):
    cut_at(0.5)(paths[-1])


def flip_a_byte(paths):
    content = bytearray(paths[-1].read_bytes())
    content[len(content) // 2] ^= 1
    paths[-1].write_bytes(content)


def damage_all(paths):
    for path in paths:
        cut_at(0.5)(path)


def newest(folder):
    return max(folder.glob("*/checkpoint_?.pth"))


def locked(relative, make):
    """After `make` nobody may read or write what lies there; the row drops root's privilege to do so all the same."""

    def lock(place):
        settings = make(place)
        path = place.folder / relative
        if not path.exists():
            path.mkdir()
        path.chmod(0)
        return settings

    return lock
