"""Questions about images become answers, in batches: a JSON line each, errors too, resumable."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from minigpt4 import load_config
from minigpt4.common.config import Config

if TYPE_CHECKING:
    from PIL.Image import Image

    from minigpt4.conversation.conversation import Chat, Conversation


class Item(NamedTuple):
    """A question about images: paths or PIL images, in order, or none."""

    id: str
    images: Sequence[str | Path | Image]
    question: str


def answer_file(path: Path, items: Sequence[Item], cfg: Config, device: str | None = None, **settings: object) -> None:
    """Append to the file `path` the answer of the model of `cfg` to each item that has no line yet.

    `settings` are those of `answers`. Raises ValueError for another kind of file, else as `minigpt4.load`.
    """
    done = answered(path, settings.get("key", "id"))
    items = [item for item in items if item.id not in done]
    chat, conv = load_config(cfg, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for line in tqdm(answers(chat, conv, items, **settings), total=len(items), unit="item"):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
    print(f"{len(items)} answers added to {path}, {len(done)} were there")


def answers(
    chat: Chat, conv: Conversation, items: Sequence[Item], key: str = "id", batch_size: int = 8, **sampling: object
) -> Iterator[dict[str, str]]:
    """Yield {key: id, "answer": text} of each item, {key: id, "error": text} of one with a bad image.

    `conv` is an empty Conversation, `sampling` are fields of Sampling. The errors of a batch come first.
    Raises ValueError for a question that the chat refuses.
    """
    from minigpt4.conversation.images import open_image

    for start in range(0, len(items), batch_size):
        readable, pixels = [], []
        for item in items[start : start + batch_size]:
            try:
                pixels.append([chat.vis_processor(open_image(image)) for image in item.images])
                readable.append(item)
            except (ValueError, OSError) as error:
                yield {key: item.id, "error": str(error)}
        # the images of all items are encoded together, then dealt out again
        together = list(chain.from_iterable(pixels))
        encoded = iter(chat.encode_images(together) if together else ())
        embeds = [list(islice(encoded, len(each))) for each in pixels]
        convs = []
        for item in readable:
            convs.append(conv.copy())
            for _ in item.images:
                convs[-1].append_image()
            chat.ask(item.question, convs[-1])
        texts = chat.answer_batch(convs, embeds, **sampling) if readable else []
        for item, (text, _) in zip(readable, texts, strict=True):
            yield {key: item.id, "answer": text}


def answered(path: Path, key: str = "id") -> set[str]:
    """Return the ids that have a line in `path`, and take a last line that was cut short away.

    Raises ValueError for another kind of file.
    """
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    lines = whole.splitlines()
    try:
        done = {json.loads(line)[key] for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--output: '{path}' is no answer file ({error}); give another name") from error
    if text and not lines and not text.startswith(f'{{"{key}"'):
        raise ValueError(f"--output: '{path}' is no answer file; give another name")
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    return done
