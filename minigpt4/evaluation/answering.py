"""Questions about images become answers, in batches: a JSON line each, errors too, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from minigpt4 import load_config
from minigpt4.common.config import Config
from minigpt4.common.utils import printable
from minigpt4.evaluation.answer_file import open_answers, settings_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from minigpt4.conversation.conversation import Chat, Conversation


class Item(NamedTuple):
    """A question about images: paths or PIL images, in order, or none."""

    id: str
    images: Sequence[str | Path | Image]
    question: str
    options: Sequence[str] = ()  # the answer is the best of them, by loss; without any it is generated


def answer_file(
    path: Path,
    items: Sequence[Item],
    cfg: Config,
    device: str | None = None,
    identity: Callable[[str], str] = str,
    **settings: object,
) -> None:
    """Append to the file `path` the answer of the model of `cfg` to each item that has none yet.

    Items of equal `identity(id)` are one. `settings` are those of `answers`. Raises ValueError for a question or
    setting that the chat would refuse and for a file of another kind or with answers to something else, OSError for
    one that is in use or cannot be written, else as `minigpt4.load`.
    """
    from minigpt4.conversation.chat import Sampling, check_question

    sampling = {name: value for name, value in settings.items() if name in Sampling.__dataclass_fields__}
    questions = list(dict.fromkeys(item.question for item in items))
    Sampling(**sampling)
    for question in questions:
        try:
            check_question(question)
        except ValueError as error:
            raise ValueError(f"--prompt: {error}") from error
    asked = settings_of(cfg, prompt=questions[0] if len(questions) == 1 else questions, **sampling)
    with open_answers(path, settings.get("key", "id"), asked, identity) as file:
        missing = [item for item in items if identity(item.id) not in file.done]
        num_errors = 0
        if missing:
            chat, conv = load_config(cfg, device)
            file.begin(again={identity(item.id) for item in missing})
            for line in tqdm(answers(chat, conv, missing, **settings), total=len(missing), unit="item"):
                file.add(line)
                num_errors += "error" in line
        if num_errors:
            print(f"{num_errors} images have an error, see their lines; a further call tries them again")
        print(f"{len(missing)} answers added to {printable(path)}, {len(items) - len(missing)} were there")


def answers(
    chat: Chat,
    conv: Conversation,
    items: Sequence[Item],
    key: str = "id",
    batch_size: int = 8,
    ranking: str = "release",
    **sampling: object,
) -> Iterator[dict[str, str]]:
    """Yield {key: id, "answer": text} of each item, {key: id, "error": text} of a bad image or too long a question.

    `conv` is an empty Conversation, `sampling` are fields of Sampling, `ranking` is one of ranking.RULES. The errors of
    a batch come first. Raises ValueError for a question that the chat refuses.
    """
    for batch, lines in encoded_batches(chat, conv, items, batch_size):
        for item_id, error in lines:
            yield {key: item_id, "error": error}
        ranked = [asked for asked in batch if asked.item.options]
        free = [asked for asked in batch if not asked.item.options]
        said = zip(free, generated(chat, free, sampling), strict=True)
        chosen = zip(ranked, _each(ranked, lambda some: _chosen(chat, some, ranking)), strict=True)
        by_item = {id(asked): line for asked, line in chain(said, chosen)}
        for asked in batch:
            yield {key: asked.item.id, **by_item[id(asked)]}


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
        readable, pixels, errors = [], [], []
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


def generated(chat: Chat, batch: list[Asked], sampling: dict[str, object]) -> list[dict[str, str]]:
    """Return {"answer": text} of each, {"error": text} of one that is too long."""

    def answer(some: list[Asked]) -> list[str]:
        convs, embeds = [asked.conv.copy() for asked in some], [asked.embeds for asked in some]
        return [text for text, _ in chat.answer_batch(convs, embeds, **sampling)]

    return _each(batch, answer)


def _chosen(chat: Chat, batch: list[Asked], ranking: str) -> list[str]:
    from minigpt4.evaluation.ranking import losses_of

    best = []
    for asked, losses in zip(batch, losses_of(chat, batch, ranking), strict=True):
        best.append(asked.item.options[losses.index(min(losses))])
    return best


def _each(batch: list[Asked], answer: Callable[[list[Asked]], list[str]]) -> list[dict[str, str]]:
    """Return {"answer": text} of each item, {"error": text} of one that is too long; the others go on."""
    from minigpt4.conversation.context import TooLongError

    if not batch:
        return []
    try:
        return [{"answer": text} for text in answer(batch)]
    except TooLongError as error:
        if len(batch) == 1:
            return [{"error": str(error)}]
    said = []
    for asked in batch:
        said += _each([asked], answer)
    return said
