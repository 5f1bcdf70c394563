"""The chat engine: images and questions in, answers out; nothing about a session is kept here.

A session is a Conversation, its list of image embeddings and, if wanted, a PrefixCache. One engine serves many
sessions; one answer (or batch) at a time is the sensible load of one model.
"""

import logging
from contextlib import closing
from dataclasses import asdict

import torch

from minigpt4.conversation.context import Context
from minigpt4.conversation.generation import AnswerText, PrefixCache, Sampling, StopRule, beam_search, decode
from minigpt4.conversation.images import open_image
from minigpt4.text.encoder import PromptEncoder
from minigpt4.text.rows import context_ids

__all__ = ["Chat", "PrefixCache", "Sampling"]

MAX_MESSAGE_CHARS = 32_768  # some 8,000 tokens; refused before it costs tokenising

logger = logging.getLogger(__name__)


class Chat:
    """Answers questions about images with a model that has `llama_model`, `llama_tokenizer`, `encode_img`, `decoder()`.

    `vis_processor` turns an RGB PIL image into float32 [3, S, S]. `stopping_criteria`: callables of (token ids [B, T],
    scores) -> bool [B], beside the stop strings of the conversation's template. `device` defaults to the model's.

    Arguments that `answer`, `stream_answer` and `answer_batch` share:
      conv, img_list    the dialogue, whose last message is the user's, and its images in order
      sampling          the fields of Sampling, by name or in 2023's order: max_new_tokens=300, temperature=1.0, ..
      stop_event        a threading.Event; when set, the answer ends with the token being computed
      on_notice         called with a sentence when turns had to be left out; logs it by default
      cache             the conversation's PrefixCache: only what is new since its last turn is computed
    """

    def __init__(self, model, vis_processor, device=None, stopping_criteria=None):
        self.model, self.vis_processor, self.stopping_criteria = model, vis_processor, stopping_criteria
        self.device = torch.device(model.device if device is None else device)
        self.encoder, self.decoder = PromptEncoder(model.llama_tokenizer), model.decoder()

    # images and questions

    @torch.no_grad()
    def encode_images(self, images):
        """Return a list of embeddings [1, Q, D], one for each image; the images are encoded as one batch.

        An image is a path, a PIL image of any mode, or pixels as the vis_processor gives them ([3, S, S] or
        [1, 3, S, S]). Raises FileNotFoundError, ImageError or ValueError.
        """
        pixels = torch.stack([self._pixels(image) for image in images])
        return list(self.model.encode_img(pixels.to(self.device))[0].split(1))

    def upload_img(self, image, conv, img_list):
        """Encode an image, append its embedding to `img_list` and its slot to `conv`; return "Received."."""
        embeds = self.encode_images([image])
        img_list += embeds
        conv.append_image()
        return "Received."

    def encode_img(self, img_list):
        """Encode, in place, the images of `img_list` that are not yet; `upload_img` has done it for its own."""
        for index, image in enumerate(img_list):
            if not self._is_embedding(image):
                img_list[index] = self.encode_images([image])[0]

    def ask(self, text, conv):
        """Append a question: to the image just uploaded, else as a new message. Raises ValueError, conv unchanged."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError("the message is empty: type a question")
        if len(text) > MAX_MESSAGE_CHARS:
            raise ValueError(f"the message has {len(text):,} characters; at most {MAX_MESSAGE_CHARS:,}: shorten it")
        conv.append_question(text.encode("utf-8", "replace").decode())  # a lone surrogate breaks tokenizers

    # answers

    def answer(self, conv, img_list, *sampling, cache=None, stop_event=None, on_notice=logger.warning, **named):
        """Return (text, token ids as a numpy array) and append the text to `conv`.

        Raises ValueError for a dialogue without an open question or settings out of range; then, as after any other
        error, `conv` is as it was.
        """
        sampling = Sampling(*sampling, **named)
        context = self._context(conv, img_list, sampling, on_notice)
        ids = self._generate([context], sampling, cache, stop_event)[0]
        return self._close(conv, context, ids), torch.tensor(ids, dtype=torch.long).numpy()

    def stream_answer(self, conv, img_list, *sampling, cache=None, stop_event=None, on_notice=logger.warning, **named):
        """Return an iterator of text pieces that join to `answer`'s text; `conv` gets it when they end.

        Closing the iterator ends the computation at once; `conv` then gets what was written so far.
        """
        sampling = Sampling(*sampling, **named)
        context = self._context(conv, img_list, sampling, on_notice)
        return self._stream(conv, context, sampling, cache, stop_event)

    def answer_batch(self, convs, img_lists, *sampling, stop_event=None, on_notice=logger.warning, **named):
        """Return a list of (text, token ids), computed as one batch; each as `answer` alone would give it."""
        sampling = Sampling(*sampling, **named)
        pairs = zip(convs, img_lists, strict=True)
        contexts = [self._context(conv, img_list, sampling, on_notice) for conv, img_list in pairs]
        answers = self._generate(contexts, sampling, None, stop_event)
        return [
            (self._close(conv, context, ids), torch.tensor(ids, dtype=torch.long).numpy())
            for conv, context, ids in zip(convs, contexts, answers, strict=True)
        ]

    def answer_prepare(self, conv, img_list, *sampling, on_notice=logger.warning, **named):
        """Return the keyword arguments of `model_generate`, for scripts that change some of them in between."""
        sampling = Sampling(*sampling, **named)
        return {"context": self._context(conv, img_list, sampling, on_notice), **asdict(sampling)}

    def model_generate(self, context, **sampling):
        """Return token ids [1, T] for what `answer_prepare` returned."""
        return torch.tensor(self._generate([context], Sampling(**sampling)))

    def get_context_emb(self, conv, img_list):
        """Return [1, L, D]: the prompt's token embeddings with the images between them."""
        images = self._images(conv, img_list)
        context = Context(self._ids(conv, images), images, (), 0)
        return context.embeds(self.model.llama_model.get_input_embeddings())

    # parts of them

    def _pixels(self, image):
        if not isinstance(image, torch.Tensor):
            return self.vis_processor(open_image(image))
        pixels = image[0] if image.ndim == 4 and len(image) == 1 else image
        if pixels.ndim != 3 or len(pixels) != 3 or not pixels.is_floating_point():
            raise ValueError(f"image: tensor {tuple(image.shape)} of {image.dtype}; expected float [3, S, S]")
        return pixels

    def _is_embedding(self, image):
        width = self.model.llama_model.get_input_embeddings().weight.shape[1]
        return isinstance(image, torch.Tensor) and image.ndim == 3 and len(image) == 1 and image.shape[2] == width

    def _images(self, conv, img_list):
        if len(img_list) != conv.num_images:
            raise ValueError(
                f"the conversation has {conv.num_images} image slot(s), img_list {len(img_list)}; "
                "upload_img keeps the two in step"
            )
        self.encode_img(img_list)
        return tuple(img_list)

    def _ids(self, conv, images):
        """Return the ids of the prompt as it stands, as a tuple."""
        return tuple(context_ids(conv.segments(), self.encoder, [image.shape[1] for image in images]))

    def _context(self, conv, img_list, sampling, on_notice):
        """Return the Context of the next answer: within the length limits, oldest turns left out where need be."""
        conv = conv.without_open_answer()
        if not conv.turns or not conv.turns[-1].is_user:
            raise ValueError("nothing to answer: the last message must be the user's; ask(text, conv) first")
        images = self._images(conv, img_list)
        longest = getattr(self.model.llama_model.config, "max_position_embeddings", None) or sampling.max_length
        limit = min(sampling.max_length, longest)
        room = limit - sampling.max_new_tokens
        if room < 1:
            raise ValueError(
                f"max_new_tokens: {sampling.max_new_tokens} leaves no room for a question in {limit} tokens"
            )

        def opened(conv):
            conv = conv.copy()
            conv.append_message(conv.roles[1], None)
            return self._ids(conv, images)

        prompt, num_left_out = opened(conv), 0
        if len(prompt) > room:
            shorter, num_left_out = conv.shortened(lambda conv: len(opened(conv)) <= room)
            prompt = opened(shorter)
        if len(prompt) >= limit:
            raise ValueError(f"question and images take {len(prompt)} tokens of {limit}: shorten the question")
        if num_left_out:
            on_notice(f"more than {room} tokens: the {num_left_out} oldest question(s) are left out, images stay")
        if len(prompt) > room:
            on_notice(f"question and images leave room for {limit - len(prompt)} tokens of an answer only")
        return Context(prompt, images, conv.template.stop, min(sampling.max_new_tokens, limit - len(prompt)))

    def _stop_rule(self, context, stop_event=None):
        known = getattr(self.model.llama_model.generation_config, "eos_token_id", None)
        ids = {self.model.llama_tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
        ids |= {self.encoder.special_ids.get(string) for string in context.stop}
        return StopRule(self.model.llama_tokenizer, context.stop, ids - {None}, self.stopping_criteria, stop_event)

    def _generate(self, contexts, sampling, cache=None, stop_event=None):
        """Return a list of token id lists, the token that ended the answer included."""
        if sampling.num_beams > 1:
            llm = self.model.llama_model
            return [beam_search(llm, context, sampling, self._stop_rule(context, stop_event)) for context in contexts]
        answers = [[] for _ in contexts]
        for step in self._decode(contexts, sampling, cache, stop_event):
            for row, token in step:
                answers[row].append(token)
        return answers

    def _decode(self, contexts, sampling, cache, stop_event):
        if any(context.stop != contexts[0].stop for context in contexts):
            raise ValueError("answer_batch: the conversations have different templates; answer those one after another")
        stop_rule = self._stop_rule(contexts[0], stop_event)
        bos = self.model.llama_tokenizer.bos_token_id
        return decode(self.decoder, contexts, sampling, stop_rule, bos, cache)

    def _stream(self, conv, context, sampling, cache, stop_event):
        answer_text, ids, shown = AnswerText(self.model.llama_tokenizer, context.stop), [], ""
        try:
            if sampling.num_beams > 1:
                ids = self._generate([context], sampling, cache, stop_event)[0]
            else:
                with closing(self._decode([context], sampling, cache, stop_event)) as steps:
                    for [(_, token)] in steps:
                        ids.append(token)
                        text = answer_text.safe(ids)
                        if len(text) > len(shown):
                            yield text[len(shown) :]
                            shown = text
        except GeneratorExit:
            self._close(conv, context, ids)
            raise
        text = self._close(conv, context, ids)
        if len(text) > len(shown):
            yield text[len(shown) :]

    def _close(self, conv, context, ids):
        """Append the answer to `conv`; return its text."""
        text = AnswerText(self.model.llama_tokenizer, context.stop).whole(ids)
        closed = conv.without_open_answer()
        closed.append_message(conv.roles[1], text)
        conv.turns = closed.turns
        return text
