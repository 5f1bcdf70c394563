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
    chat: Chat, conv: Conversation, items: Sequence[Item], key: str = "id", batch_size: int = 8, **sampling: object
) -> Iterator[dict[str, str]]:
    """Yield {key: id, "answer": text} of each item, {key: id, "error": text} of a bad image or too long a question.

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
        for item, said in zip(readable, _answered(chat, convs, embeds, sampling), strict=True):
            yield {key: item.id, **said}


def _answered(
    chat: Chat, convs: list[Conversation], embeds: list[list[Tensor]], sampling: dict[str, object]
) -> list[dict[str, str]]:
    """Return {"answer": text} of each conversation, {"error": text} of one that is too long; the others go on."""
    from minigpt4.conversation.context import TooLongError

    if not convs:
        return []
    try:
        return [{"answer": text} for text, _ in chat.answer_batch(convs, embeds, **sampling)]
    except TooLongError as error:
        if len(convs) == 1:
            return [{"error": str(error)}]
    said = []
    for conv, its_embeds in zip(convs, embeds, strict=True):
        said += _answered(chat, [conv], [its_embeds], sampling)
    return said
