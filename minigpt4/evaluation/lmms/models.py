"""MiniGPT-4 as models of lmms-eval: the chat form and, with `--force_simple`, the simple form, which also ranks.

lmms-eval --model minigpt4 --model_args cfg_path=eval.yaml,model.ckpt=checkpoint.pth --tasks NAME --batch_size 8
"""

import logging
import math
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
from minigpt4.conversation.sampling import Sampling
from minigpt4.evaluation.answering import answer_all, generated
from minigpt4.evaluation.items import EncodedItem, Item
from minigpt4.evaluation.ranking import losses_of

# the generation_kwargs of a task that are used; others are for the libraries of other models
TAKEN = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "num_beams",
    "repetition_penalty",
    "length_penalty",
)


class MiniGPT4(lmms):
    """Base class of both forms. `settings` are configuration keys, as with --options of evaluate.py."""

    KWARGS = 0  # position of generation_kwargs among the arguments of a request

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
        """The model's device, on which lmms-eval also gathers the number of requests of all ranks."""
        return self.chat.device

    def document(self, request: Instance) -> Any:
        """Return the document of a request, whose last three arguments are its index, the task and the split."""
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
        """Yield the indices of up to `batch_size` requests with the same generation_kwargs."""
        by_kwargs: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_kwargs.setdefault(repr(request.args[self.KWARGS]), []).append(index)
        for indices in by_kwargs.values():
            for start in range(0, len(indices), self.batch_size):
                yield indices[start : start + self.batch_size]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the answer to each request; "", with a warning, if the request is too long for the LLM."""
        answers: dict[int, str] = {}
        with tqdm(
            total=len(requests), desc="MiniGPT-4", unit="item", disable=self.rank != 0
        ) as progress:
            for indices in self.batches(requests):
                batch = [requests[index] for index in indices]
                kwargs = batch[0].args[self.KWARGS]
                lines = generated(self.chat, self.encoded(batch), sampling(kwargs))
                for index, line in zip(indices, lines, strict=True):
                    if "error" in line:
                        logging.warning("request %d has no answer: %s", index, line["error"])
                    answers[index] = cut(line.get("answer", ""), kwargs.get("until") or ())
                progress.update(len(indices))
        return [answers[index] for index in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raise NotImplementedError: tasks of several rounds are not supported."""
        raise NotImplementedError(
            "minigpt4: tasks of several rounds are not supported; use those of one question"
        )

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Raise NotImplementedError: lmms-eval defines ranking for the simple form only."""
        raise NotImplementedError(
            "minigpt4: candidates are ranked in the simple form only: add --force_simple"
        )


class MiniGPT4Chat(MiniGPT4):
    """The chat form: messages of several roles, with images at any place in them."""

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
            num_images = parts.count(IMAGE)
            images_then_text = num_images == len(parts) - 1 and parts[-1] is not IMAGE
            if message.role == "system":
                conv.system = " ".join(map(str, parts))
            elif message.role == "user" and images_then_text:
                # Build the same prompt as evaluate.py.
                for _ in range(num_images):
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
        if len(request.args) != 6:  # acc_mutual_info asks for a continuation without a question
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
        """Return (mean loss per token, whether greedy decoding gives the continuation) for each request.

        The pair is wrapped in a GenerationResult because lmms-eval 0.7 converts a plain pair to text, and then fails.

        lmms-eval takes the least loss as the best. A continuation is tokenised by itself and ends with the template's
        end symbol, as an answer in training; the space that lmms-eval puts before it is stripped, as the template
        provides it. One that is too long for the LLM has an infinite loss, with a warning.
        """
        found = []
        for start in tqdm(
            range(0, len(requests), self.batch_size), desc="MiniGPT-4", disable=self.rank != 0
        ):
            part = requests[start : start + self.batch_size]
            batch = []
            for request, encoded in zip(part, self.encoded(part), strict=True):
                item = Item("", (), "", options=(self.continuation(request),))
                batch.append(encoded._replace(item=item))
            ranked = answer_all(batch, lambda items: losses_of(self.chat, items, "mean"))
            written = generated(self.chat, batch, sampling(self.as_long_as(batch)))
            for index, (encoded, loss, line) in enumerate(zip(batch, ranked, written, strict=True)):
                if "error" in loss:
                    logging.warning("request %d is not ranked: %s", start + index, loss["error"])
                (mean,) = loss.get("answer", [math.inf])
                pair = (mean, line.get("answer") == encoded.item.options[0])
                found.append(GenerationResult(text=pair))
        return found

    def as_long_as(self, batch: Sequence[EncodedItem]) -> dict[str, int]:
        """Return the max_new_tokens within which greedy decoding can write any of the continuations and end it.

        At most the default, so that a prompt keeps its room.
        """
        end = "".join(self.conv.template.stop)
        texts = [encoded.item.options[0] + end for encoded in batch]
        ids = self.chat.model.llama_tokenizer(texts).input_ids
        return {"max_new_tokens": min(max(map(len, ids)) + 1, Sampling.max_new_tokens)}

    def continuation(self, request: Instance) -> str:
        """Return the candidate answer of a request, whose loss is computed."""
        target = request.args[1]
        return str(target(self.document(request)) if callable(target) else target).strip()


def sampling(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a task's generation_kwargs as fields of the chat's Sampling: greedy unless they say otherwise."""
    fields = {key: kwargs[key] for key in TAKEN if kwargs.get(key) is not None}
    if kwargs.get("do_sample") is False or "temperature" not in fields:
        fields["temperature"] = 0.0
    return fields


def cut(text: str, until: str | Sequence[str]) -> str:
    """Return the text before the first occurrence of any of the stop strings `until`."""
    for end in [until] if isinstance(until, str) else until:
        if end:
            text = text.partition(end)[0]
    return text
