"""Draw the quickstart's data and fetch its LLM: `python -m minigpt4.quickstart.prepare`.

Below `<env.cache_root>/embedded`: `llm/`, and `data-v<DATA_VERSION>/` with three datasets:

    laion/, cc_sbu/    shards as img2dataset writes them: NNNNN.tar (key.jpg, key.txt, key.json), NNNNN_stats.json;
                       captions: in laion/ terse ones that name nearly everything, in cc_sbu/ a few facts in random order
    cc_sbu_align/      filter_cap.json and image/<id>.jpg; long descriptions, and answers to questions

and `validation-v<DATA_VERSION>/` with a few held-out images for validation, in the formats of `laion/` and `cc_sbu_align/`.
"""

import argparse
import io
import json
import logging
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from minigpt4.common.config import load_environment
from minigpt4.common.utils import expand_path
from minigpt4.quickstart import language, world
from minigpt4.quickstart.arguments import add_cache_root
from minigpt4.quickstart.llm import prepare_llm
from minigpt4.quickstart.questions import draw_question

DATA_VERSION = 3  # raise it when images or captions change: existing data is reused
SHARD_SIZE = 500
NUM_SAMPLES = {"laion": 4000, "cc_sbu": 4000, "cc_sbu_align": 1000}
NUM_VALIDATION = 12
Caption = Callable[[world.Scene, np.random.Generator], str]


def cache_folder(cache_root: str | Path | None = None) -> Path:
    """Return the quickstart's folder below `cache_root`, by default the one in minigpt4/configs/default.yaml."""
    return expand_path(cache_root or load_environment().cache_root) / "embedded"


def data_folder(cache: Path) -> Path:
    """Return the folder of the training data below `cache`."""
    return cache / f"data-v{DATA_VERSION}"


def validation_folder(cache: Path) -> Path:
    """Return the folder of the validation data of both stages below `cache`."""
    return cache / f"validation-v{DATA_VERSION}"


def encode(image: np.ndarray) -> bytes:
    """Return an RGB image as JPEG, in img2dataset's quality."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def write_data(folder: Path) -> Path:
    """Write the three training datasets to `folder`, if absent; return `folder`."""

    def write(scratch: Path, progress: tqdm) -> None:
        first, second = NUM_SAMPLES["laion"], NUM_SAMPLES["cc_sbu"]
        write_shards(scratch / "laion", 0, first, language.list_caption, progress)
        write_shards(scratch / "cc_sbu", first, second, language.fact_caption, progress)
        write_alignment_set(scratch / "cc_sbu_align", NUM_SAMPLES["cc_sbu_align"], progress)

    return written(folder, write, sum(NUM_SAMPLES.values()))


def write_validation(folder: Path) -> Path:
    """Write a few images of held-out compositions, captioned as in each stage, to `folder`, if absent; return `folder`."""

    def write(scratch: Path, progress: tqdm) -> None:
        write_shards(
            scratch / "laion", 0, NUM_VALIDATION, language.list_caption, progress, world.VALIDATION
        )
        write_alignment_set(scratch / "cc_sbu_align", NUM_VALIDATION, progress, world.VALIDATION)

    return written(folder, write, 2 * NUM_VALIDATION)


def written(folder: Path, write: Callable[[Path, tqdm], None], num_images: int) -> Path:
    """Fill `folder` by `write(scratch folder, progress bar)`, if absent; return it. It appears complete, by a rename."""
    if folder.is_dir():
        return folder
    scratch = folder.with_name(folder.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    with tqdm(total=num_images, desc="drawing", unit="image") as progress:
        write(scratch, progress)
    scratch.rename(folder)
    return folder


def write_shards(
    folder: Path, first: int, count: int, caption: Caption, progress: tqdm, split: str = "stage1"
) -> None:
    """Write images `first` .. `first + count - 1` of a split as tar shards with 9-digit keys."""
    folder.mkdir(parents=True)
    size = min(SHARD_SIZE, count)
    for shard in range(count // size):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for number in range(size):
                key = f"{shard:05}{number:04}"
                files = pair(key, first + shard * size + number, caption, split)
                for extension, data in files.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                progress.update()
        stats = {"count": size, "successes": size, "failed_to_download": 0, "failed_to_resize": 0}
        (folder / f"{shard:05}_stats.json").write_text(json.dumps(stats, indent=4))


def pair(key: str, index: int, caption: Caption, split: str) -> dict[str, bytes]:
    """Return {extension: content} of the three files that a shard holds of image `index` of a split."""
    scene, image = world.draw(split, index)[:2]
    text = caption(scene, world.generator(split, index).spawn(1)[0])
    record = {"url": f"drawn:{split}/{index}", "caption": text, "key": key}
    record |= {"status": "success", "error_message": None}
    for name, size in (("width", image.shape[1]), ("height", image.shape[0])):
        record |= {name: size, f"original_{name}": size}
    content = json.dumps(record | {"exif": "{}"}).encode()
    return {"jpg": encode(image), "txt": text.encode(), "json": content}


def write_alignment_set(folder: Path, count: int, progress: tqdm, split: str = "stage2") -> None:
    """Write images 0 .. `count - 1` of a split, each with a description, two in three with a question as well."""
    (folder / "image").mkdir(parents=True)
    annotations = []
    for index in range(count):
        scene, image = world.draw(split, index)[:2]
        (folder / "image" / f"{index}.jpg").write_bytes(encode(image))
        rng = world.generator(split, index).spawn(1)[0]
        annotations.append({"image_id": str(index), "caption": language.describe(scene, rng)})
        if index % 3:
            asked = draw_question(scene, index - index // 3)
            record = {"image_id": str(index), "caption": asked.sentence}
            annotations.append({**record, "instruction": asked.taught(rng)})
        progress.update()
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": annotations}, indent=1))


def prepare(cache_root: str | Path | None = None) -> Path:
    """Fetch the LLM and draw all data, where absent; return the cache folder."""
    cache = cache_folder(cache_root)
    prepare_llm(cache / "llm")
    write_data(data_folder(cache))
    write_validation(validation_folder(cache))
    return cache


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_cache_root(parser)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(f"the embedded default's data and language model are in {prepare(arguments.cache_root)}")
