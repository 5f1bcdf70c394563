"""Answer questions about images in batches: one JSON line per item, errors included, resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from minigpt4 import load_config
from minigpt4.common.config import Config
from minigpt4.common.utils import printable
from minigpt4.evaluation.answer_file import open_answers, settings_of
from minigpt4.evaluation.items import EncodedItem, Item, encoded_batches
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
    """Answer each item that has no answer in the file `path` yet, with the model of `cfg`, and append the answers.

    Items with equal `identity(id)` count as one. `settings` are keyword arguments of `answers`. Raises ValueError for
    a question or setting that the chat refuses and for a file of another kind or with answers to another question,
    OSError for a file that is in use or cannot be written, and what `minigpt4.load` raises.
    """
    from minigpt4.conversation.chat import Sampling, check_question

    # Refuse bad settings and questions before loading the model, which takes minutes.
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
    # Refuse a file whose answers were produced with other settings; else ask only the items it lacks.
    prompt = questions[0] if len(questions) == 1 else questions
    answer_settings = settings_of(cfg, prompt=prompt, **sampling)
    with open_answers(path, settings.get("key", "id"), answer_settings, identity) as file:
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
    """Yield {key: id, "answer": text} for each item; {key: id, "error": text} for a bad image or too long a question.

    `conv` is an empty Conversation, `sampling` are fields of Sampling, `ranking` is one of ranking.RULES. Within a
    batch the errors come first, then generated answers, then the answers of items with options. Raises ValueError for
    a question that the chat refuses.
    """
    for batch, errors in encoded_batches(chat, conv, items, batch_size):
        for item_id, error in errors:
            yield {key: item_id, "error": error}
        to_rank = [encoded for encoded in batch if encoded.item.options]
        to_generate = [encoded for encoded in batch if not encoded.item.options]
        lines = [*generated(chat, to_generate, sampling), *chosen(chat, to_rank, ranking)]
        for encoded, line in zip([*to_generate, *to_rank], lines, strict=True):
            yield {key: encoded.item.id, **line}


def generated(
    chat: Chat, batch: list[EncodedItem], sampling: dict[str, object]
) -> list[dict[str, str]]:
    """Return {"answer": text} for each item, {"error": text} for one that is too long for the LLM.

    An answer that is sampled with a seed depends on it and the item's id, not on the batch.
    """

    def answer(items: list[EncodedItem]) -> list[str]:
        convs = [encoded.conv.copy() for encoded in items]
        embeds = [encoded.embeds for encoded in items]
        seeds = [item_seed(sampling.get("seed"), encoded.item.id) for encoded in items]
        return [text for text, _ in chat.answer_batch(convs, embeds, seeds=seeds, **sampling)]

    return answer_all(batch, answer)


def item_seed(seed: int | None, item_id: str) -> int | None:
    """Return the seed of an item's answer, the same in any batch, on any rank and in a call that resumes."""
    if seed is None:
        return None
    digest = hashlib.sha256(f"{seed} {item_id}".encode("utf-8", "backslashreplace")).digest()
    return int.from_bytes(digest[:4], "big")


def chosen(chat: Chat, batch: list[EncodedItem], rule: str) -> list[dict[str, str]]:
    """Return {"answer": the option with the least loss} for each item, {"error": text} for one that is too long."""

    def answer(items: list[EncodedItem]) -> list[str]:
        losses = losses_of(chat, items, rule)
        return [
            encoded.item.options[of_item.index(min(of_item))]
            for encoded, of_item in zip(items, losses, strict=True)
        ]

    return answer_all(batch, answer)


def answer_all(batch: list[EncodedItem], answer: Callable[[list[EncodedItem]], list]) -> list[dict]:
    """Return {"answer": what `answer` returns} for each item, {"error": text} for one that is too long.

    If one item of a batch is too long, its items are answered one by one, so that the others get their answers.
    """
    from minigpt4.conversation.context import TooLongError

    if not batch:
        return []
    try:
        return [{"answer": each} for each in answer(batch)]
    except TooLongError as error:
        if len(batch) == 1:
            return [{"error": str(error)}]
    lines = []
    for encoded in batch:
        lines += answer_all([encoded], answer)
    return lines
