"""The data on which the quickstart's vision is pretrained: drawn images with targets for its queries and its tokens."""

from collections.abc import Iterator

import cv2
import numpy as np
import torch

from minigpt4.quickstart import world
from minigpt4.quickstart.vision import QUERIES, VOCABULARY, answers

# What each token of the ViT learns to tell about the object at its patch: {label: number of classes}.
TOKEN_KINDS = ("shape", "colour", "size", "cell")
TOKEN_LABELS = {"object": 1 + world.MAX_OBJECTS}
TOKEN_LABELS |= {kind: len(VOCABULARY[kind]) for kind in TOKEN_KINDS}
NOTHING = -100  # no target: the index that cross_entropy ignores


class DrawnImages(torch.utils.data.IterableDataset):
    """Batches `first` .. `last` - 1: RGB images uint8 [B, S, S, 3], query targets [B, Q], token targets [B, N, 5].

    The last `num_crowded` images of each batch hold more than MAX_OBJECTS objects and have no query targets.
    """

    def __init__(
        self,
        split: str,
        first: int,
        last: int,
        batch_size: int,
        patch_size: int,
        num_crowded: int = 0,
    ):
        self.split, self.batches = split, range(first, last)
        self.batch_size, self.patch_size = batch_size, patch_size
        self.num_crowded = num_crowded

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        worker = torch.utils.data.get_worker_info()
        own = self.batches[worker.id :: worker.num_workers] if worker else self.batches
        first_crowded = self.batch_size - self.num_crowded
        for batch in own:
            start = batch * self.batch_size
            samples = [self.sample(start + i, i >= first_crowded) for i in range(self.batch_size)]
            yield tuple(torch.from_numpy(np.stack(part)) for part in zip(*samples, strict=True))

    def sample(self, index: int, crowded: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the RGB image uint8 [S, S, 3], query targets [Q] and token targets [N, 5] of image `index`."""
        numbers = (world.MAX_OBJECTS + 1, len(world.CELLS)) if crowded else (1, world.MAX_OBJECTS)
        scene, *maps = world.draw(self.split, index, numbers)
        image, object_map = maps
        # JPEG artefacts as in the training images of both stages
        jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90 + index % 10])[1]
        decoded = cv2.imdecode(jpeg, cv2.IMREAD_COLOR)
        targets = [NOTHING] * len(QUERIES) if crowded else answers(scene)
        return decoded, np.array(targets), self.token_targets(scene, object_map)

    def token_targets(self, scene: world.Scene, object_map: np.ndarray) -> np.ndarray:
        """Return TOKEN_LABELS [N, 5] of the object that covers most of each patch, if that is more than a fifth of it."""
        p, side = self.patch_size, object_map.shape[0] // self.patch_size
        patches = (
            object_map.reshape(side, p, side, p).transpose(0, 2, 1, 3).reshape(side * side, p * p)
        )
        cover = np.stack([(patches == k).mean(1) for k in range(1, len(scene.objects) + 1)], 1)
        object_of_patch = np.where(cover.max(1) > 0.2, cover.argmax(1) + 1, 0)
        # row 0: no object; row k: object k, whose number is not asked for in a crowded image
        rows = [[0] + [NOTHING] * (len(TOKEN_LABELS) - 1)]
        for k, item in enumerate(scene.objects, 1):
            labels = [VOCABULARY[kind].index(getattr(item, kind)) for kind in TOKEN_KINDS]
            rows.append([k if len(scene.objects) <= world.MAX_OBJECTS else NOTHING, *labels])
        return np.array(rows)[object_of_patch]
