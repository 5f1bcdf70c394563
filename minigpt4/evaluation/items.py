"""Items: questions about images, and how the chat takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from minigpt4.conversation.conversation import Chat, Conversation


class Item(NamedTuple):
    """A question about images: paths or PIL images, in order, or none."""

    id: str
    images: Sequence[str | Path | Image]
    question: str
    # the answer is the best of them, by loss; without any it is generated
    options: Sequence[str] = ()


class Asked(NamedTuple):
    """An item as the chat takes it."""

    item: Item
    conv: Conversation
    embeds: list[Tensor]  # of its images, in order


def encoded_batches(
    chat: Chat, conv: Conversation, items: Sequence[Item], batch_size: int
) -> Iterator[tuple[list[Asked], list[tuple[str, str]]]]:
    """Yield (items with their images encoded, [(id, error)] of those with a bad image) of one batch after another.

    Raises ValueError for a question that the chat refuses.
    """
    from minigpt4.conversation.images import open_image

    for start in range(0, len(items), batch_size):
        readable, errors = [], []
        pixels = []  # of each item that is readable, of each image
        for item in items[start : start + batch_size]:
            try:
                pixels.append([chat.vis_processor(open_image(image)) for image in item.images])
                readable.append(item)
            except (ValueError, OSError) as error:
                errors.append((item.id, str(error)))
        # the images of all items are encoded together, then dealt out again
        together = list(chain.from_iterable(pixels))
        encoded = iter(chat.encode_images(together) if together else ())
        batch = []
        for item, own in zip(readable, pixels, strict=True):
            asked = Asked(item, conv.copy(), list(islice(encoded, len(own))))
            for _ in own:
                asked.conv.append_image()
            chat.ask(item.question, asked.conv)
            batch.append(asked)
        yield batch, errors
