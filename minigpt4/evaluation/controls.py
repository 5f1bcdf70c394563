"""Controls: the same questions with uninformative images. A score that does not drop is not read from the images."""

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
        return tuple(map(blank, self[1]))  # field 1: the original images


def blank(image: "str | Path | Image") -> "Image":
    """Return a grey image of the same size. Raises ValueError or OSError as `open_image`."""
    from minigpt4.conversation.images import open_image
    from minigpt4.datasets.datasets.image_controls import blank_image

    return blank_image(open_image(image).size)


def shuffled(items: Sequence[BenchmarkItem], seed: int = 0) -> list[BenchmarkItem]:
    """Return the items, each with the images of another; all questions about one image move to the same other image.

    No item keeps its images, and each image is used. The exchange depends only on the items and `seed`. Raises
    ValueError if all items are about the same image.
    """
    images = {images_key(item): item.images for item in items if item.images}
    keys = list(images)
    random.Random(seed).shuffle(keys)
    if len(keys) < 2:
        raise ValueError(
            "--control shuffled: all items are about the same image; two images are needed"
        )
    # In a circle, each gets the images of the one before it.
    given = {key: images[keys[number - 1]] for number, key in enumerate(keys)}
    return [item._replace(images=given.get(images_key(item), item.images)) for item in items]
