"""Controls: the same questions with images that do not help. A score that stays is not read from the images."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4.evaluation.benchmarks.benchmark import BenchmarkItem, images_key

if TYPE_CHECKING:
    from PIL.Image import Image

CONTROLS = ("blank", "shuffled")


def with_control(items: Sequence[BenchmarkItem], control: str) -> list[BenchmarkItem]:
    """Return the items as they are ("" for no control), with grey images, or with those of another item.

    Raises ValueError for another name, and where there are no images to take away or to exchange.
    """
    if control not in ("", *CONTROLS):
        raise ValueError(f"--control: unknown name '{control}'; known: {', '.join(CONTROLS)}")
    if control and not any(item.images for item in items):
        raise ValueError(f"--control {control}: the items have no images")
    if control == "shuffled":
        return shuffled(items)
    return [BlankItem(*item) for item in items] if control else list(items)


class BlankItem(BenchmarkItem):
    """An item whose images are grey ones of the same size, made when they are asked for."""

    @property
    def images(self) -> tuple["Image", ...]:
        """The grey images. Raises ValueError or OSError for one that cannot be opened."""
        return tuple(map(blank, self[1]))


def blank(image: "str | Path | Image") -> "Image":
    """Return a grey image of the size of another. Raises ValueError or OSError as `open_image`."""
    from minigpt4.conversation.images import open_image
    from minigpt4.datasets.datasets.image_controls import blank_image

    return blank_image(open_image(image).size)


def shuffled(items: Sequence[BenchmarkItem], seed: int = 0) -> list[BenchmarkItem]:
    """Return the items, each with the images of another: questions about one image are about one other again.

    No item keeps its image, and each image is used. The same items give the same exchange. Raises ValueError if all
    items are about the same image.
    """
    images = {images_key(item): item.images for item in items if item.images}
    keys = sorted(images, key=list(images).index)
    random.Random(seed).shuffle(keys)
    if len(keys) < 2:
        raise ValueError(
            "--control shuffled: all items are about the same image; two images are needed"
        )
    # in a circle, everyone gets what the next one has
    given = {key: images[keys[number - 1]] for number, key in enumerate(keys)}
    return [item._replace(images=given.get(images_key(item), item.images)) for item in items]
