"""The drawn world: synthetic scenes sampled by seed and drawn by OpenCV, with labels that are exact by construction.

A scene is a background and one to three objects (more in crowded images), each with a size, a colour, a shape and a cell
of a 3 x 3 grid; no two objects share colour and shape, so 'the red circle' is unambiguous. Everything is determined by
(VERSION, split, index) and the permitted number of objects. Two things are held out from training:

* left-out pairs: the eight colour-shape pairs of LEFT_OUT_PAIRS occur in the split `left_out` only;
* unseen compositions: a stable hash of the scene's content (not of its pixels) reserves one composition
  in ten for the evaluation splits, so no evaluation image has the composition of a training image.

The shipped weights depend on the images: whatever changes the order of random draws changes the world.
"""

import hashlib
from dataclasses import dataclass

import cv2
import numpy as np

VERSION = 1
IMAGE_SIZE = 112

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
SIZES = ("small", "large")
CELLS = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
BACKGROUNDS = (
    "gray",
    "beige",
    "light blue",
    "striped",
    "checkered",
    "grass",
    "night sky",
    "brick wall",
)
MAX_OBJECTS = 3

# Each colour and each shape lacks one partner only, so training shows each of them in seven other pairs.
LEFT_OUT_PAIRS = frozenset(
    zip(
        COLOURS,
        ("star", "ring", "circle", "heart", "square", "triangle", "diamond", "cross"),
        strict=True,
    )
)

TRAIN_SPLITS = ("pretrain", "stage1", "stage2")
EVAL_SPLITS = ("held_out", "left_out")
VALIDATION = "validation"  # scenes like those of held_out, for validation during training
_EVAL_SHARE = 10  # one composition in ten is for evaluation

_RGB = {
    "red": (215, 35, 40), "orange": (250, 135, 20), "yellow": (245, 220, 45), "green": (35, 150, 60),
    "blue": (40, 75, 210), "purple": (135, 45, 165), "white": (245, 245, 245), "black": (25, 25, 28),
}  # fmt: skip


@dataclass(frozen=True)
class Object:
    size: str
    colour: str
    shape: str
    cell: str

    @property
    def row(self) -> int:
        return CELLS.index(self.cell) // 3

    @property
    def column(self) -> int:
        return CELLS.index(self.cell) % 3


@dataclass(frozen=True)
class Scene:
    """Objects stand in reading order (top row first, then left to right)."""

    background: str
    objects: tuple[Object, ...]

    def is_for_evaluation(self) -> bool:
        """Whether the scene's composition is reserved for the evaluation splits, by its hash."""
        digest = hashlib.sha256(repr((VERSION, self)).encode()).digest()
        return digest[0] * 256 + digest[1] < 65536 // _EVAL_SHARE

    def has_left_out_pair(self) -> bool:
        return any((o.colour, o.shape) in LEFT_OUT_PAIRS for o in self.objects)


def generator(split: str, index: int) -> np.random.Generator:
    """Return the random generator of image `index` of `split`: the same on every machine."""
    splits = (*TRAIN_SPLITS, *EVAL_SPLITS, VALIDATION)
    return np.random.default_rng([VERSION, splits.index(split), index])


def sample_scene(
    split: str, rng: np.random.Generator, numbers: tuple[int, int] = (1, MAX_OBJECTS)
) -> Scene:
    """Return a random scene that `split` may contain, with `numbers` (least, most) objects, by rejection sampling."""

    def pick(names: tuple[str, ...]) -> str:
        return names[rng.integers(len(names))]

    wanted = (split not in TRAIN_SPLITS, split == "left_out")
    while True:
        count = rng.integers(numbers[0], numbers[1] + 1)
        cells = np.sort(rng.choice(len(CELLS), size=count, replace=False))
        objects = tuple(Object(pick(SIZES), pick(COLOURS), pick(SHAPES), CELLS[c]) for c in cells)
        if len({(o.colour, o.shape) for o in objects}) < len(objects):
            continue
        scene = Scene(pick(BACKGROUNDS), objects)
        if (scene.is_for_evaluation(), scene.has_left_out_pair()) == wanted:
            return scene


def draw(
    split: str, index: int, numbers: tuple[int, int] = (1, MAX_OBJECTS), size: int = IMAGE_SIZE
) -> tuple[Scene, np.ndarray, np.ndarray]:
    """Return scene, RGB image uint8 [size, size, 3], object map uint8 [size, size] (0: background, k: object k, from 1)."""
    rng = generator(split, index)
    scene = sample_scene(split, rng, numbers)
    image = _draw_background(scene.background, rng, size)
    object_map = np.zeros((size, size), np.uint8)
    for number, item in enumerate(scene.objects, 1):
        _draw_object(image, object_map, number, item, rng, dark=scene.background == "night sky")
    return scene, image, object_map


def boxes(scene: Scene, object_map: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Return the box (left, top, width, height) in pixels of each object of a scene, from its object map."""
    found = []
    for number in range(1, len(scene.objects) + 1):
        ys, xs = np.nonzero(object_map == number)
        left, top = int(xs.min()), int(ys.min())
        found.append((left, top, int(xs.max()) + 1 - left, int(ys.max()) + 1 - top))
    return found


def _shade(rgb, rng, spread: int = 12) -> tuple[int, int, int]:
    """Return `rgb` with each channel shifted at random by up to `spread`."""
    shifted = np.array(rgb) + rng.integers(-spread, spread + 1, 3)
    return tuple(int(v) for v in np.clip(shifted, 0, 255))


def _polygon(points) -> np.ndarray:
    return np.array(points, np.float64)


def _star(points: int = 5, inner: float = 0.45) -> np.ndarray:
    angle = np.arange(2 * points) * np.pi / points - np.pi / 2
    radius = np.where(np.arange(2 * points) % 2, inner, 1.1)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)


def _circle(radius: float = 1.0) -> np.ndarray:
    angle = np.arange(40) * np.pi / 20
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def _heart() -> np.ndarray:
    t = np.arange(40) * np.pi / 20
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y - 2.5], 1) / 15.5


def _cross(arm: float = 0.34) -> np.ndarray:
    corner = [(-arm, -1), (arm, -1), (arm, -arm)]
    quarters = [
        np.array(corner) @ np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), k) for k in range(4)
    ]
    return np.concatenate(quarters)


# Outlines in units of the object's radius, y downwards; a second contour is a hole.
_CONTOURS = {
    "circle": [_circle()],
    "square": [_polygon([(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)])],
    "triangle": [_polygon([(0, -1.05), (1.08, 0.85), (-1.08, 0.85)])],
    "star": [_star()],
    "heart": [_heart()],
    "cross": [_cross()],
    "ring": [_circle(1.05), _circle(0.55)],
    "diamond": [_polygon([(0, -1.2), (0.8, 0), (0, 1.2), (-0.8, 0)])],
}


def _draw_object(image, object_map, number: int, item: Object, rng, dark: bool) -> None:
    """Draw one object into its cell of image and object map, with a thin edge that shows on every background.

    `dark`: whether the background is dark.
    """
    size = image.shape[0]
    # size, position within the cell and tilt vary a little
    radius = size * (rng.uniform(0.075, 0.09) if item.size == "small" else rng.uniform(0.135, 0.15))
    slack = max(0.0, size / 6 - radius * 1.1) * 0.8
    cell_centre = np.array([item.column + 0.5, item.row + 0.5]) * size / 3
    centre = cell_centre + rng.uniform(-slack, slack, 2)
    tilt = rng.uniform(-0.15, 0.15)
    rotation = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
    # in sixteenths of a pixel (shift=4)
    contours = [
        np.round((c @ rotation * radius + centre) * 16).astype(np.int32)
        for c in _CONTOURS[item.shape]
    ]
    edge = _shade((215, 215, 225) if dark else (55, 55, 60), rng)
    cv2.fillPoly(object_map, contours[:1], number, shift=4)
    cv2.fillPoly(image, contours, _shade(_RGB[item.colour], rng, 20), cv2.LINE_AA, shift=4)
    cv2.polylines(image, contours, True, edge, 1, cv2.LINE_AA, shift=4)


def _draw_background(kind: str, rng, size: int) -> np.ndarray:
    """Return a canvas uint8 [size, size, 3] of the named kind, with light noise."""
    image = np.empty((size, size, 3), np.uint8)
    ys, xs = np.mgrid[:size, :size]
    if kind == "striped":
        angle, period = rng.uniform(0, np.pi), size / rng.uniform(7, 11)
        mask = np.sin((xs * np.cos(angle) + ys * np.sin(angle)) * 2 * np.pi / period) > 0
        image[:] = np.where(
            mask[..., None], _shade((205, 190, 225), rng), _shade((165, 150, 195), rng)
        )
    elif kind == "checkered":
        cell, offset = size / rng.uniform(7, 10), rng.uniform(0, size, 2)
        mask = (((xs + offset[0]) // cell + (ys + offset[1]) // cell) % 2).astype(bool)
        image[:] = np.where(
            mask[..., None], _shade((225, 225, 220), rng), _shade((165, 170, 175), rng)
        )
    elif kind == "grass":
        image[:] = _shade((95, 165, 75), rng)
        for x, y, lean, light in zip(*rng.uniform(0, 1, (4, size * 3)), strict=True):
            start = (int(x * size), int(y * size))
            end = (start[0] + int(lean * 7 - 3), start[1] - int(size * 0.05))
            cv2.line(image, start, end, (60 + int(60 * light), 120 + int(80 * light), 45), 1)
    elif kind == "night sky":
        image[:] = _shade((20, 24, 62), rng, 8)
        for x, y in rng.integers(0, size, (size // 2, 2)):
            image[y, x] = rng.integers(150, 256)
    elif kind == "brick wall":
        image[:] = _shade((200, 190, 180), rng)
        height = int(size * rng.uniform(0.07, 0.1))
        for row, y in enumerate(range(-int(rng.integers(height)), size, height)):
            for x in range(-height * 2 + (row % 2) * height, size, height * 2):
                cv2.rectangle(
                    image,
                    (x + 1, y + 1),
                    (x + height * 2 - 1, y + height - 1),
                    _shade((165, 90, 75), rng),
                    -1,
                )
    else:
        plain = {"gray": (150, 150, 152), "beige": (228, 212, 178), "light blue": (165, 210, 240)}
        image[:] = _shade(plain[kind], rng)
    noise = rng.integers(-5, 6, (size, size, 1))
    return np.clip(image.astype(np.int16) + noise, 0, 255).astype(np.uint8)
