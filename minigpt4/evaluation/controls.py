"""Controls: the same questions with uninformative images. A score that does not drop is not read from the images."""

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4.evaluation.benchmarks.benchmark import BenchmarkItem, images_key

if TYPE_CHECKING:
    from PIL.Image import Image

CONTROLS = ("blank", "shuffled")


def with_control(items: Sequence[BenchmarkItem], control: str) -> list[BenchmarkItem]:
    """Return the items unchanged ("" for no control), with grey images, or with the images of another item.

    Raises ValueError for an unknown name, and if there are no images to replace or to exchange.
    """
    if control not in ("", *CONTROLS):
        raise ValueError(f"--control: unknown name '{control}'; known: {', '.join(CONTROLS)}")
    if control and not any(item.images for item in items):
        raise ValueError(f"--control {control}: the items have no images")
    if control == "shuffled":
        return shuffled(items)
    if control == "blank":
        return [BlankItem(*item) for item in items]
    return list(items)


class BlankItem(BenchmarkItem):
    """An item whose images are replaced by grey ones of the same size, created on access."""

    @property
    def images(self) -> tuple["Image", ...]:
        """The grey images. Raises ValueError or OSError for an original that cannot be opened."""
        return tuple(map(blank, original_images(self)))


def original_images(item: BenchmarkItem) -> Sequence["str | Path | Image"]:
    """Return the images of an item as they were given, also those of a BlankItem."""
    return item[BenchmarkItem._fields.index("images")]


def blank(image: "str | Path | Image") -> "Image":
    """Return a grey image of the same size. Raises ValueError or OSError as `open_image`."""
    from minigpt4.conversation.images import open_image
    from minigpt4.datasets.datasets.image_controls import blank_image

    return blank_image(open_image(image).size)


def shuffled(items: Sequence[BenchmarkItem], seed: int = 0) -> list[BenchmarkItem]:
    """Return the items, each with the images of another that has as many; items about the same images stay together.

    No item gets an image of its own, and each image is used where none has to be avoided. The exchange depends only on
    the items and `seed`. Raises ValueError if an item finds no other to exchange with.
    """
    images = {images_key(item): item.images for item in items if item.images}
    keys = list(images)
    random.Random(seed).shuffle(keys)
    files = {key: set(map(_file, images[key])) for key in keys}
    same_count: dict[int, list[tuple]] = {}
    for key in keys:
        same_count.setdefault(len(key), []).append(key)
    given = {}
    for group in same_count.values():
        for number, key in enumerate(group):
            # In a circle, each gets the images of the one before it, or of the last before it that shares none.
            before = (group[number - step] for step in range(1, len(group)))
            giver = next((other for other in before if files[other].isdisjoint(files[key])), None)
            if giver is None:
                first = next(item.id for item in items if images_key(item) == key)
                raise ValueError(
                    f"--control shuffled: item '{first}' has {len(key)} image(s), and no item has as many others; "
                    "add one, or leave it out"
                )
            given[key] = images[giver]
    return [item._replace(images=given.get(images_key(item), item.images)) for item in items]


def _file(image: "str | Path | Image") -> str | int:
    """Return what is equal for two paths to one file; of a PIL image its identity."""
    return os.path.realpath(image) if isinstance(image, (str, Path)) else id(image)
