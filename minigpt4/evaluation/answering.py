"""Questions about images become answers, in batches: a JSON line each, errors too, resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from minigpt4 import load_config
from minigpt4.common.config import Config
from minigpt4.common.utils import printable
from minigpt4.evaluation.answer_file import open_answers, settings_of
from minigpt4.evaluation.items import Asked, Item, encoded_batches
from minigpt4.evaluation.ranking import losses_of

if TYPE_CHECKING:
    from minigpt4.conversation.conversation import Chat, Conversation


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

    # Bad questions and settings are refused before the model is loaded, which takes minutes.
    sampling = {
        name: value for name, value in settings.items() if name in Sampling.__dataclass_fields__
    }
    questions = list(dict.fromkeys(item.question for item in items))
    Sampling(**sampling)
    for question in questions:
        try:
            check_question(question)
        except ValueError as error:
            raise ValueError(f"--prompt: {error}") from error
    # A file that answers something else is refused; of this one only what is missing is asked.
    asked = settings_of(cfg, prompt=questions[0] if len(questions) == 1 else questions, **sampling)
    with open_answers(path, settings.get("key", "id"), asked, identity) as file:
        missing = [item for item in items if identity(item.id) not in file.done]
        num_errors = 0
        if missing:
            chat, conv = load_config(cfg, device)
            file.begin(again={identity(item.id) for item in missing})
            for line in tqdm(
                answers(chat, conv, missing, **settings), total=len(missing), unit="item"
            ):
                file.add(line)
                num_errors += "error" in line
        if num_errors:
            print(
                f"{num_errors} images have an error, see their lines; a further call tries them again"
            )
        print(
            f"{len(missing)} answers added to {printable(path)}, {len(items) - len(missing)} were there"
        )


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

    `conv` is an empty Conversation, `sampling` are fields of Sampling, `ranking` is one of ranking.RULES. Of a batch
    the errors come first, then what is generated, then what is chosen. Raises ValueError for a question that the chat
    refuses.
    """
    for batch, errors in encoded_batches(chat, conv, items, batch_size):
        for item_id, error in errors:
            yield {key: item_id, "error": error}
        ranked = [asked for asked in batch if asked.item.options]
        free = [asked for asked in batch if not asked.item.options]
        lines = [*generated(chat, free, sampling), *chosen(chat, ranked, ranking)]
        for asked, line in zip([*free, *ranked], lines, strict=True):
            yield {key: asked.item.id, **line}


def generated(chat: Chat, batch: list[Asked], sampling: dict[str, object]) -> list[dict[str, str]]:
    """Return {"answer": text} of each, {"error": text} of one that is too long."""

    def answer(some: list[Asked]) -> list[str]:
        convs, embeds = [asked.conv.copy() for asked in some], [asked.embeds for asked in some]
        return [text for text, _ in chat.answer_batch(convs, embeds, **sampling)]

    return _each(batch, answer)


def chosen(chat: Chat, batch: list[Asked], rule: str) -> list[dict[str, str]]:
    """Return {"answer": the best of its options} of each, {"error": text} of one that is too long."""

    def best(some: list[Asked]) -> list[str]:
        found = zip(some, losses_of(chat, some, rule), strict=True)
        return [asked.item.options[losses.index(min(losses))] for asked, losses in found]

    return _each(batch, best)


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
