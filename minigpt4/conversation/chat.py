"""The chat engine: images and questions in, answers out. It holds no state of a session.

A session is a Conversation, its list of image embeddings and, optionally, a PrefixCache, all held by
the caller. One engine serves many sessions; let one model compute one answer (or batch) at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from minigpt4.common.logger import warn_once
from minigpt4.conversation.answer_text import AnswerText
from minigpt4.conversation.context import Context
from minigpt4.conversation.fitting import fitted_context, prompt_ids
from minigpt4.conversation.generation import StopRule, beam_search, decode
from minigpt4.conversation.images import fitted_processor, pixels_of
from minigpt4.conversation.message import MAX_MESSAGE_CHARS, check_question
from minigpt4.conversation.prefix_cache import PrefixCache
from minigpt4.conversation.sampling import Request, Sampling, request_of
from minigpt4.text.encoder import PromptEncoder
from minigpt4.text.templates import Template, template_for

if TYPE_CHECKING:  # conversation.py imports this module: in 2023 Chat was there
    from minigpt4.conversation.conversation import Conversation

__all__ = ["MAX_MESSAGE_CHARS", "Chat", "PrefixCache", "Sampling", "check_question"]

_REQUEST_FIELDS = ("cache", "stop_event", "on_notice")  # of Request, not Sampling


class Chat:
    """Answers questions about images with a MiniGPT model.

    `model` has `llama_model`, `llama_tokenizer`, `encode_img` and `decoder()`; `vis_processor` turns
    an RGB PIL image into float32 [3, S, S]; `device` defaults to the model's. `stopping_criteria`:
    callables (token ids [B, T], scores) -> bool [B], in addition to the template's stop strings.

    Arguments that `answer`, `stream_answer` and `answer_batch` share:
      conv, img_list    the dialogue, whose last message is the user's, and its images in order
      sampling          the fields of Sampling, by name or in 2023's order: max_new_tokens=300, ..
      stop_event        a threading.Event; when set, the answer ends with the token being computed
      on_notice         called with a sentence, e.g. when turns were left out; logged by default
      cache             the conversation's PrefixCache, whose content is not computed again (not for batches)
    """

    def __init__(
        self,
        model: nn.Module,
        vis_processor: Callable,
        device: Any = None,
        stopping_criteria: Any = None,
    ):
        self.model, self.vis_processor = model, fitted_processor(vis_processor, model)
        self.stopping_criteria = stopping_criteria
        self.penalty = getattr(model, "repetition_penalty", 1)
        self.max_length = Sampling.max_length  # of calls that give none
        self.device = torch.device(model.device if device is None else device)
        self.encoder, self.decoder = PromptEncoder(model.llama_tokenizer), model.decoder()

    def check_template(self, template: Template) -> None:
        """Warn if `template` is not the dialogue format that the model was trained with; once for each format."""
        prompt_template, end_sym = getattr(self.model, "trained_text", ("", ""))
        if prompt_template and not template.is_like(template_for(prompt_template, end_sym)):
            before, between = template.user[0], template.user[1] + template.answer
            warn_once(
                self.model,
                f"the conversation puts {before!r} before a question and {between!r} before an answer; the model was "
                f"trained with prompt_template {prompt_template!r} and end_sym {end_sym!r}, so what it says may be "
                "nonsense. Use the conversation that minigpt4.load returns, or "
                f"Conversation(template_for({prompt_template!r}, {end_sym!r}))",
            )

    @property
    def defaults(self) -> dict[str, float]:
        """The fields of Sampling in which a single answer differs from Sampling's defaults."""
        return {"repetition_penalty": self.penalty, "max_length": self.max_length}

    @property
    def longest(self) -> int:
        """The most tokens of prompt and answer together, in calls that give no `max_length`."""
        return min(self.max_length, self.max_positions or self.max_length)

    @property
    def max_positions(self) -> int | None:
        """The LLM's own limit, None if it has none."""
        return getattr(self.model.llama_model.config, "max_position_embeddings", None)

    # images and questions

    @torch.no_grad()
    def encode_images(self, images: Iterable[Any]) -> list[Tensor]:
        """Return one embedding [1, Q, D] per image, encoded as one batch.

        An image is a path, a PIL image of any mode, or pixels as the vis_processor returns them
        ([3, S, S] or [1, 3, S, S]). Raises FileNotFoundError, ImageError or ValueError.
        """
        pixels = torch.stack([pixels_of(image, self.vis_processor) for image in images])
        return list(self.model.encode_img(pixels.to(self.device))[0].split(1))

    def upload_img(self, image: Any, conv: "Conversation", img_list: list) -> str:
        """Append an image's embedding to `img_list` and its slot to `conv`; return "Received."."""
        img_list += self.encode_images([image])
        conv.append_image()
        return "Received."

    def encode_img(self, img_list: list) -> None:
        """Encode, in place, those images of `img_list` that are not embeddings yet."""
        for index, image in enumerate(img_list):
            if not self._is_embedding(image):
                img_list[index] = self.encode_images([image])[0]

    def ask(self, text: str, conv: "Conversation") -> None:
        """Append a question to the image just uploaded, else as a new message. Raises ValueError, see `check_question`."""
        check_question(text)
        conv.append_question(text)

    # answers

    def answer(
        self, conv: "Conversation", img_list: list, *sampling: Any, **named: Any
    ) -> tuple[str, np.ndarray]:
        """Return (text, token ids [T]) and append the text to `conv`.

        Raises ValueError for a dialogue that does not end with a question, or settings out of range.
        After any error `conv` is unchanged.
        """
        request = request_of(sampling, named, _REQUEST_FIELDS, self.defaults)
        context = self._context(conv, img_list, request)
        return self._append_answer(conv, context, self._generate([context], request)[0])

    def stream_answer(
        self, conv: "Conversation", img_list: list, *sampling: Any, **named: Any
    ) -> Iterator[str]:
        """Return an iterator over pieces of `answer`'s text, which is appended to `conv` at the end.

        Closing the iterator ends the computation at once; what was written so far is appended.
        """
        request = request_of(sampling, named, _REQUEST_FIELDS, self.defaults)
        return self._stream(conv, self._context(conv, img_list, request), request)

    def answer_batch(
        self,
        convs: Sequence["Conversation"],
        img_lists: Sequence[list],
        *sampling: Any,
        **named: Any,
    ) -> list[tuple[str, np.ndarray]]:
        """Return [(text, token ids [T])], computed as one batch; each is the one that `answer` would give.

        `seeds`: one per conversation, in place of `seed`. Without a `repetition_penalty` there is none, also if the
        model has one.
        """
        defaults = {"max_length": self.max_length}
        request = request_of(sampling, named, ("stop_event", "on_notice", "seeds"), defaults)
        pairs = zip(convs, img_lists, strict=True)
        contexts = [self._context(conv, img_list, request) for conv, img_list in pairs]
        answers = self._generate(contexts, request)
        return [self._append_answer(*each) for each in zip(convs, contexts, answers, strict=True)]

    def answer_prepare(
        self, conv: "Conversation", img_list: list, *sampling: Any, **named: Any
    ) -> dict[str, Any]:
        """Return the keyword arguments of `model_generate`, for scripts that change some of them."""
        request = request_of(sampling, named, ("on_notice",), self.defaults)
        return {"context": self._context(conv, img_list, request), **asdict(request.sampling)}

    def model_generate(self, context: Context, streamer: Any = None, **sampling: Any) -> Tensor:
        """Return token ids [1, T] for what `answer_prepare` returned.

        `streamer`, one of transformers, gets each token as it is decoded; with beam search it gets all at the end.
        """
        request, ids = request_of((), sampling), []
        try:
            if request.sampling.num_beams > 1:
                tokens = iter(self._generate([context], request)[0])
            else:
                tokens = (token for [(_, token)] in self._decode([context], request))
            for token in tokens:
                ids.append(token)
                if streamer is not None:
                    streamer.put(torch.tensor([token]))
        finally:
            if streamer is not None:  # or its reader would wait for ever
                streamer.end()
        return torch.tensor([ids])

    def answer_contexts(self, contexts: Sequence[Context], **sampling: Any) -> list[str]:
        """Return the texts that follow the prompts of `contexts`, computed as one batch."""
        answers = self._generate(contexts, request_of((), sampling))
        return list(map(self._text, contexts, answers))

    def get_context_emb(self, conv: "Conversation", img_list: list) -> Tensor:
        """Return the prompt's embeddings [1, L, D], with those of the images in their places."""
        images = self._images(conv, img_list)
        context = Context(prompt_ids(conv, images, self.encoder), images, (), 0)
        return context.embeds(self.model.llama_model.get_input_embeddings())

    # helpers

    def _is_embedding(self, image: Any) -> bool:
        width = self.model.llama_model.get_input_embeddings().weight.shape[1]
        is_matrix = isinstance(image, torch.Tensor) and image.ndim == 3 and len(image) == 1
        return is_matrix and image.shape[2] == width

    def _images(self, conv: "Conversation", img_list: list) -> tuple[Tensor, ...]:
        if not isinstance(img_list, list):
            raise ValueError(f"img_list: a {type(img_list).__name__}; expected a list, [] for none")
        if len(img_list) != conv.num_images:
            raise ValueError(
                f"the conversation has {conv.num_images} image slot(s), img_list {len(img_list)}; "
                "upload_img keeps the two in step; a slot that a script writes is <Img><ImageHere></Img>"
            )
        self.encode_img(img_list)
        return tuple(img_list)

    def _context(self, conv: "Conversation", img_list: list, request: Request) -> Context:
        """Return the Context of the next answer; the oldest turns are left out if it would be too long."""
        self.check_template(conv.template)
        conv = conv.without_open_answer()
        if not conv.messages or conv.messages[-1][0] != conv.roles[0]:
            raise ValueError(
                "nothing to answer: the last message must be the user's; ask(text, conv) first"
            )
        images = self._images(conv, img_list)
        return fitted_context(conv, images, self.encoder, self.max_positions, request)

    def _stop_rule(self, context: Context, request: Request) -> StopRule:
        tokenizer = self.model.llama_tokenizer
        # end tokens: the tokenizer's, the LLM's, and stop strings that are a single special token
        of_llm = getattr(self.model.llama_model.generation_config, "eos_token_id", None)
        eos_ids = {tokenizer.eos_token_id, *(of_llm if isinstance(of_llm, list) else [of_llm])}
        eos_ids.update(map(self.encoder.special_ids.get, context.stop))
        eos_ids.discard(None)
        criteria, event = self.stopping_criteria, request.stop_event
        return StopRule(tokenizer, context.stop, eos_ids, criteria, event)

    def _generate(self, contexts: Sequence[Context], request: Request) -> list[list[int]]:
        """Return the token ids of each answer, including the token that ended it."""
        if request.sampling.num_beams > 1:
            answers, llm = [], self.model.llama_model
            for row, context in enumerate(contexts):
                stop_rule = self._stop_rule(context, request)
                sampling = replace(request.sampling, seed=request.seed(row))
                answers.append(beam_search(llm, context, sampling, stop_rule))
            return answers
        answers = [[] for _ in contexts]
        for step in self._decode(contexts, request):
            for row, token in step:
                answers[row].append(token)
        return answers

    def _decode(
        self, contexts: Sequence[Context], request: Request
    ) -> Iterator[list[tuple[int, int]]]:
        if any(context.stop != contexts[0].stop for context in contexts):
            raise ValueError(
                "answer_batch: the conversations have different templates; answer those one after another"
            )
        stop_rule = self._stop_rule(contexts[0], request)
        bos_id = self.encoder.tokenizer.bos_token_id
        return decode(self.decoder, contexts, request, stop_rule, bos_id)

    def _stream(self, conv: "Conversation", context: Context, request: Request) -> Iterator[str]:
        answer_text = AnswerText(self.model.llama_tokenizer, context.stop)
        try:
            if request.sampling.num_beams > 1:
                answer_text.ids += self._generate([context], request)[0]
            else:
                with closing(self._decode([context], request)) as steps:
                    for [(_, token)] in steps:
                        if piece := answer_text.add(token):
                            yield piece
        except GeneratorExit:
            self._append_answer(conv, context, answer_text.ids)
            raise
        self._append_answer(conv, context, answer_text.ids)
        if piece := answer_text.rest():
            yield piece

    def _append_answer(
        self, conv: "Conversation", context: Context, ids: list[int]
    ) -> tuple[str, np.ndarray]:
        """Append the answer to `conv`; return its text and token ids."""
        text = self._text(context, ids)
        conv.append_answer(text)
        return text, np.array(ids, dtype=np.int64)

    def _text(self, context: Context, ids: list[int]) -> str:
        """Return the text of an answer, without its stop string or end token."""
        return AnswerText(self.model.llama_tokenizer, context.stop).whole(ids)
