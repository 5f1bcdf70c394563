"""Items: questions about images, and their encoding for the chat."""

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
    """A question about images: paths or PIL images, in order; there may be none."""

    id: str
    images: Sequence[str | Path | Image]
    question: str
    # The answer is the option with the least loss; without options it is generated.
    options: Sequence[str] = ()


class EncodedItem(NamedTuple):
    """An item ready for the chat."""

    item: Item
    conv: Conversation  # with the images' places and the question
    embeds: list[Tensor]  # image features, one tensor per image, in order


def encoded_batches(
    chat: Chat, conv: Conversation, items: Sequence[Item], batch_size: int
) -> Iterator[tuple[list[EncodedItem], list[tuple[str, str]]]]:
    """Yield (items with encoded images, [(id, error)] of the items with a bad image) for each batch.

    Raises ValueError for a question that the chat refuses.
    """
    from minigpt4.conversation.images import open_image

    for start in range(0, len(items), batch_size):
        readable, errors = [], []
        pixels = []  # for each readable item, its processed images
        for item in items[start : start + batch_size]:
            try:
                pixels.append([chat.vis_processor(open_image(image)) for image in item.images])
                readable.append(item)
            except (ValueError, OSError) as error:
                errors.append((item.id, str(error)))
        # Encode the images of all items in one call, then hand each item its own features.
        all_pixels = list(chain.from_iterable(pixels))
        features = iter(chat.encode_images(all_pixels) if all_pixels else ())
        batch = []
        for item, item_pixels in zip(readable, pixels, strict=True):
            embeds = list(islice(features, len(item_pixels)))
            encoded = EncodedItem(item, conv.copy(), embeds)
            for _ in embeds:
                encoded.conv.append_image()
            chat.ask(item.question, encoded.conv)
            batch.append(encoded)
        yield batch, errors
