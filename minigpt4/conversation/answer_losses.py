"""The losses of given candidate answers to a dialogue, to rank them."""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

import torch

from minigpt4.conversation.chat import Chat
from minigpt4.conversation.context import TooLongError
from minigpt4.conversation.conversation import Conversation
from minigpt4.text.rows import answer_row


class AnswerLoss(NamedTuple):
    """The loss of an answer, including its end symbol."""

    total: float  # sum over its tokens
    num_tokens: int  # of the answer
    num_positions: int  # of prompt, images and answer


@torch.no_grad()
def answer_losses(
    chat: Chat,
    convs: Sequence[Conversation],
    img_lists: Sequence[list],
    candidates: Sequence[Sequence[str]],
) -> list[list[AnswerLoss]]:
    """Return the losses of each dialogue's candidates, computed as one batch; an image is encoded once.

    `convs` and `img_lists` are those of `Chat.answer_batch`, and so are the prompts; the dialogues are not changed.
    Raises TooLongError if prompt and answer do not fit into the LLM's context.
    """
    rows, images = [], []
    limit = getattr(chat.model.llama_model.config, "max_position_embeddings", None)
    for conv, img_list, answers in zip(convs, img_lists, candidates, strict=True):
        chat.check_template(conv.template)
        chat.encode_img(img_list)
        opened = conv.copy()
        opened.append_message(conv.roles[1], None)
        prompt = opened.segments()
        image_indices = range(len(images), len(images) + len(img_list))
        sizes = [image.shape[1] for image in img_list]
        rows += [
            answer_row(prompt, text, conv.template, chat.encoder, sizes, image_indices)
            for text in answers
        ]
        images += img_list
    longest = max(len(row.ids) for row in rows)
    if limit and longest > limit:
        raise TooLongError(
            f"question, images and answer take {longest} tokens of {limit}: shorten them"
        )
    width = chat.model.llama_model.get_input_embeddings().weight.shape[1]
    vectors = (
        torch.cat(images)
        if images
        else torch.zeros(0, chat.model.num_image_tokens, width, device=chat.device)
    )
    sums = chat.model.row_losses(rows, vectors)

    # one list for each dialogue
    lengths = [len(row.ids) for row in rows]
    losses = iter(map(AnswerLoss, sums["loss"].tolist(), sums["num_targets"].tolist(), lengths))
    return [list(islice(losses, len(answers))) for answers in candidates]
