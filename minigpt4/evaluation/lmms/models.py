"""MiniGPT-4 as lmms-eval's models: the chat form, and with `--force_simple` the simple form, which ranks too.

lmms-eval --model minigpt4 --model_args cfg_path=eval.yaml,model.ckpt=checkpoint.pth --tasks NAME --batch_size 8
"""

import logging
import os
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

import minigpt4
from minigpt4.conversation.conversation import IMAGE, Conversation, message_segments
from minigpt4.conversation.message import Message
from minigpt4.evaluation.answering import generated
from minigpt4.evaluation.items import EncodedItem, Item
from minigpt4.evaluation.ranking import losses_of

# of a task's generation_kwargs; the others are for the libraries that other models are made with
TAKEN = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "num_beams",
    "repetition_penalty",
    "length_penalty",
)


class MiniGPT4(lmms):
    """What both forms have in common. `settings` are keys of the configuration, as with --options of evaluate.py."""

    KWARGS = 0  # place of generation_kwargs among the arguments of a request

    def __init__(
        self,
        cfg_path: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if not cfg_path:
            raise ValueError(
                "model_args: cfg_path is missing; give a YAML file, e.g. cfg_path=my_eval.yaml"
            )
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size: {batch_size!r}; expected a number")
        if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        options = [f"{key}={value}" for key, value in settings.items()]
        self.chat, self.conv = minigpt4.load(str(cfg_path), options, device)
        self.batch_size = int(batch_size)

    @property
    def device(self) -> torch.device:
        """Where the model computes; lmms-eval counts the requests of all ranks there."""
        return self.chat.device

    def document(self, request: Instance) -> Any:
        """Return the document of a request, whose arguments end with number, task and split."""
        task, split = request.args[-2:]
        return self.task_dict[task][split][request.args[-3]]

    def dialogue(self, request: Instance) -> tuple[Conversation, list[Any]]:
        """Return the dialogue of a request and its images, in order."""
        raise NotImplementedError(f"{type(self).__name__}.dialogue")

    def encoded(self, requests: Sequence[Instance]) -> list[EncodedItem]:
        """Return the dialogues of a batch of requests, with all images encoded in one call."""
        dialogues = [self.dialogue(request) for request in requests]
        all_images = list(chain.from_iterable(images for _, images in dialogues))
        features = iter(self.chat.encode_images(all_images) if all_images else ())
        return [
            EncodedItem(Item("", images, ""), conv, list(islice(features, len(images))))
            for conv, images in dialogues
        ]

    def batches(self, requests: Sequence[Instance]) -> Iterator[list[int]]:
        """Yield numbers of requests with the same generation_kwargs, at most `batch_size` together."""
        same: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            same.setdefault(repr(request.args[self.KWARGS]), []).append(number)
        for numbers in same.values():
            for start in range(0, len(numbers), self.batch_size):
                yield numbers[start : start + self.batch_size]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return an answer to each request; "", with a warning, where it is too long for the LLM."""
        answers: dict[int, str] = {}
        with tqdm(
            total=len(requests), desc="MiniGPT-4", unit="item", disable=self.rank != 0
        ) as progress:
            for numbers in self.batches(requests):
                batch = [requests[number] for number in numbers]
                kwargs = batch[0].args[self.KWARGS]
                for number, line in zip(
                    numbers, generated(self.chat, self.asked(batch), sampling(kwargs)), strict=True
                ):
                    if "error" in line:
                        logging.warning("request %d has no answer: %s", number, line["error"])
                    answers[number] = cut(line.get("answer", ""), kwargs.get("until") or ())
                progress.update(len(numbers))
        return [answers[number] for number in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raise NotImplementedError: tasks of several rounds are not supported."""
        raise NotImplementedError(
            "minigpt4: tasks of several rounds are not supported; use those of one question"
        )

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Raise NotImplementedError: lmms-eval has no chat form of it."""
        raise NotImplementedError(
            "minigpt4: candidates are ranked in the simple form only: add --force_simple"
        )


class MiniGPT4Chat(MiniGPT4):
    """The chat form: messages of several roles, with images wherever they stand in them."""

    is_simple, KWARGS = False, 2

    def dialogue(self, request: Instance) -> tuple[Conversation, list[Any]]:
        """Return the dialogue of a request and its images. Raises ValueError for video and audio."""
        doc_to_messages = request.args[1]
        messages = ChatMessages(messages=doc_to_messages(self.document(request)))
        images, *others = messages.extract_media()
        if any(others):
            raise ValueError(
                f"{request.task_name}: document {request.doc_id} has video or audio; minigpt4 sees images only"
            )
        conv = self.conv.copy()
        for message in messages.messages:
            parts = [IMAGE if part.type == "image" else part.text for part in message.content]
            if message.role == "system":
                conv.system = " ".join(map(str, parts))
            elif (
                message.role == "user"
                and parts.count(IMAGE) == len(parts) - 1
                and parts[-1] is not IMAGE
            ):
                # images, then a question: the prompt of evaluate.py
                for _ in parts[:-1]:
                    conv.append_image()
                conv.append_question(parts[-1])
            else:
                role = conv.roles[message.role == "assistant"]
                conv.append_message(role, Message(message_segments(parts)))
        return conv, images


class MiniGPT4Simple(MiniGPT4):
    """The simple form: a document's images, then one question."""

    is_simple, KWARGS = True, 1

    def dialogue(self, request: Instance) -> tuple[Conversation, list[Any]]:
        """Return the dialogue of a request and its images. Raises ValueError for a request without a document."""
        if len(request.args) != 6:  # of acc_mutual_info: a continuation without a question
            raise ValueError(
                "minigpt4: a continuation needs a question; metrics such as acc_mutual_info cannot be had"
            )
        question, doc_to_visual = request.args[0], request.args[2]
        images = doc_to_visual(self.document(request)) or []
        conv = self.conv.copy()
        for _ in images:
            conv.append_image()
        self.chat.ask(question, conv)
        return conv, images

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return (mean loss a token, whether the continuation is what the model says greedily) of each request.

        It stands in a GenerationResult: of a plain pair lmms-eval 0.7 makes a text, and fails.

        lmms-eval takes the least loss for the best. A continuation is tokenised by itself and ends with the template's
        end symbol, as an answer in training; the blank that lmms-eval puts before it is the template's matter.
        """
        found = []
        for start in tqdm(
            range(0, len(requests), self.batch_size), desc="MiniGPT-4", disable=self.rank != 0
        ):
            batch = []
            for request in requests[start : start + self.batch_size]:
                (asked,) = self.asked([request])
                batch.append(asked._replace(item=Item("", (), "", (self.continuation(request),))))
            losses = losses_of(self.chat, batch, "mean")
            lines = generated(self.chat, batch, sampling({}))
            for asked, loss, line in zip(batch, losses, lines, strict=True):
                pair = (loss[0], line.get("answer") == asked.item.options[0])
                found.append(GenerationResult(text=pair))
        return found

    def continuation(self, request: Instance) -> str:
        """Return the text whose loss is wanted."""
        target = request.args[1]
        return str(target(self.document(request)) if callable(target) else target).strip()


def sampling(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return generation_kwargs of a task as fields of the chat's Sampling: greedy unless it says otherwise."""
    given = {key: kwargs[key] for key in TAKEN if kwargs.get(key) is not None}
    is_greedy = kwargs.get("do_sample") is False or "temperature" not in given
    return given | ({"temperature": 0.0} if is_greedy else {})


def cut(text: str, until: str | Sequence[str]) -> str:
    """Return the text before the first of the strings that end an answer."""
    for end in [until] if isinstance(until, str) else until:
        text = text.partition(end)[0] if end else text
    return text
