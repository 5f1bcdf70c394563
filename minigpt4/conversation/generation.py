"""Decoding an answer: token by token in a loop of our own, or beam search by transformers' `generate`.

The loop yields tokens as they come (without a thread, so closing the generator stops the work and
errors reach the caller), samples from a random generator of its own (`sampling.py`), and keeps the
KV cache of a conversation between turns.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from threading import Event
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.common.device import send, shared_generators
from minigpt4.conversation.context import Context
from minigpt4.conversation.sampling import Request, Sampling, draw, filter_logits, own_generator

if TYPE_CHECKING:  # transformers takes seconds to import
    from minigpt4.models.llm.decoding import Decoder

_SAMPLED_ONLY = ("temperature", "top_p", "top_k")  # fields of Sampling that greedy search ignores
MOST_OPEN = 3 / 4  # a batch drops its ended rows once at most this share is still open


class StoppingCriteriaSub:
    """Ends the rows whose last tokens equal one of `stops` (id sequences); the name is 2023's."""

    def __init__(self, stops: Iterable = (), encounters: int = 1):
        self.stops = [torch.as_tensor(stop).flatten().tolist() for stop in stops]

    def __call__(self, input_ids: Tensor, scores: Any = None, **kwargs: Any) -> Tensor:
        """Return bool [B] for token ids [B, T]."""
        ended = list(map(self._ends, input_ids.tolist()))
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)

    def _ends(self, row: list[int]) -> bool:
        return any(stop and row[-len(stop) :] == stop for stop in self.stops)


class StopRule:
    """Tells which rows have ended: by an end token, a stop string, the caller's criteria or the stop event."""

    def __init__(
        self,
        tokenizer,
        strings: Sequence[str],
        eos_ids: Iterable[int],
        criteria=(),
        event: Event | None = None,
    ):
        self.tokenizer, self.strings = tokenizer, strings
        self.criteria, self.event = criteria or (), event
        self.eos_ids = frozenset(eos_ids)
        # a token is at least a byte: so many of the last ones hold any stop string that has just been completed
        self.tail = max((len(string.encode()) for string in strings), default=0) + 1

    def __call__(self, new_ids: Tensor, scores: Any = None, **kwargs: Any) -> Tensor:
        """Return bool [B] for the answers so far, [B, T]; a stopping criterion of `generate`."""
        ended = self.ended(new_ids[:, -self.tail :].tolist(), new_ids, scores)
        return torch.tensor(ended, dtype=torch.bool, device=new_ids.device)

    def ended(self, rows: Sequence[list[int]], new_ids: Tensor, scores: Any = None) -> list[bool]:
        """Return for each answer whether it has ended.

        `rows` are the answers so far, or at least their last `tail` tokens, on the host; `new_ids` [B, T] are the answers
        on the device. Only criteria read them, so without any there is no device synchronisation.
        """
        is_stopped = self.event is not None and self.event.is_set()
        ended = [is_stopped or self._ends(row[-self.tail :]) for row in rows]
        for criterion in self.criteria:
            more = torch.as_tensor(criterion(new_ids, scores)).expand(len(rows)).tolist()
            ended = [before or now for before, now in zip(ended, more, strict=True)]
        return ended

    def _ends(self, row: list[int]) -> bool:
        """Whether the last token is an end token, or the text of `row` contains a stop string."""
        if row[-1] in self.eos_ids:
            return True
        text = self.tokenizer.decode(row) if self.strings else ""
        return any(string in text for string in self.strings)


def padded_batch(
    llm: nn.Module, contexts: Sequence[Context], reused: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return (embeddings [B, T, D], mask [B, T] or None, positions [B, T]), padded on the left.

    The first `reused` positions are left out: they are in the KV cache, which only a batch of one has.
    """
    embedding = llm.get_input_embeddings()
    rows = [context.embeds(embedding)[0, reused:] for context in contexts]
    width = max(map(len, rows))
    embeds = torch.stack([F.pad(row, (0, 0, width - len(row), 0)) for row in rows])
    padding = torch.tensor([width - len(row) for row in rows], device=embeds.device)
    positions = torch.arange(width, device=embeds.device) - padding[:, None]
    mask = (positions >= 0).long() if any(len(row) < width for row in rows) else None
    return embeds, mask, positions.clamp(min=0) + reused


@dataclass
class _Answer:
    """The answer of one row of a batch: its tokens so far, and whether it goes on."""

    row: int
    max_new_tokens: int
    generator: torch.Generator | None = None  # None: greedy
    ids: list[int] = field(default_factory=list)
    is_open: bool = True


@torch.no_grad()
def decode(
    decoder: "Decoder",
    contexts: Sequence[Context],
    request: Request,
    stop_rule: StopRule,
    bos_id: int | None,
) -> Iterator[list[tuple[int, int]]]:
    """Yield for each step [(row, token)] of the rows that are still open, until every row has ended.

    Each row has its own positions and random numbers, so that a batch gives the same answers as its rows
    alone. A cache is for a batch of one; it keeps what was computed, also when the caller closes the generator.
    """
    sampling, cache = request.sampling, request.cache
    # the KV cache of the last turn, as far as the prompt begins alike, and the rest of the prompt
    past, reused = cache.take(contexts[0]) if cache is not None else (None, 0)
    past = decoder.new_past() if past is None else past
    embeds, *mask_and_positions = padded_batch(decoder.llm, contexts, reused)
    mask, positions = mask_and_positions
    device, num_rows = embeds.device, len(contexts)
    longest = reused + embeds.shape[1] + max(context.max_new_tokens for context in contexts)
    # the answers so far: on the device, after BOS, and on the host, which decides which rows go on
    start = 0 if bos_id is None else 1
    history = torch.full((num_rows, start), bos_id or 0, device=device)
    if not start:  # min_length counts BOS
        sampling = replace(sampling, min_length=max(sampling.min_length - 1, 0))
    answers = [_Answer(row, context.max_new_tokens) for row, context in enumerate(contexts)]
    if not sampling.is_greedy:
        for answer in answers:
            answer.generator = own_generator(request.seed(answer.row), device)
    try:
        logits = decoder.prefill(past, embeds, positions, mask)
        with decoder.steps(past, num_rows, longest) as step:
            while True:
                # a token for each row, also for those that have ended but are still in the batch
                logits = filter_logits(logits, history, sampling, stop_rule.eos_ids)
                tokens = draw(logits, [answer.generator for answer in answers if answer.generator])
                history = torch.cat([history, tokens[:, None]], 1)
                values = tokens.tolist()  # the only device synchronisation of a step
                if min(values) < 0:
                    raise RuntimeError("the LLM's logits are not numbers (NaN): no token to draw")
                for answer, token in zip(answers, values, strict=True):
                    answer.ids.append(token)
                yield [(answer.row, answer.ids[-1]) for answer in answers if answer.is_open]
                # a row ends by the stop rule, at its own maximum length, or by its own stop event
                ended = stop_rule.ended([answer.ids for answer in answers], history[:, start:])
                for answer, has_ended in zip(answers, ended, strict=True):
                    is_full = len(answer.ids) >= answer.max_new_tokens
                    answer.is_open &= not (has_ended or is_full or request.is_stopped(answer.row))
                kept = [place for place, answer in enumerate(answers) if answer.is_open]
                if not kept:
                    return
                positions = positions[:, -1:] + 1
                mask = None if mask is None else F.pad(mask, (0, 1), value=1)
                # drop the rows that have ended, once there are enough of them to be worth the copies
                if len(kept) <= MOST_OPEN * len(answers):
                    answers = [answers[place] for place in kept]
                    (index,) = send(kept, device=device)
                    past.batch_select_indices(index)
                    mask = None if mask is None else mask[index]
                    tokens, history = tokens[index], history[index]
                    positions = positions[index]
                logits = step(tokens, positions, mask)
    finally:
        if cache is not None:
            cache.put(past, contexts[0], answers[0].ids)


@torch.no_grad()
def beam_search(
    llm: nn.Module, context: Context, sampling: Sampling, stop_rule: StopRule
) -> list[int]:
    """Return the token ids of the best beam."""
    embeds = context.embeds(llm.get_input_embeddings())
    names = () if sampling.is_greedy else _SAMPLED_ONLY
    # `generate` samples from torch's default generators: one search at a time, so that seeds hold
    exclusive = nullcontext() if sampling.is_greedy else shared_generators
    devices = [embeds.device] if embeds.is_cuda else []
    with exclusive, torch.random.fork_rng(devices, enabled=sampling.seed is not None):
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        ids = llm.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
            max_new_tokens=context.max_new_tokens,
            min_new_tokens=max(sampling.min_length - 1, 0),
            num_beams=sampling.num_beams,
            repetition_penalty=float(sampling.repetition_penalty),
            length_penalty=float(sampling.length_penalty),
            do_sample=not sampling.is_greedy,
            eos_token_id=sorted(stop_rule.eos_ids),
            pad_token_id=min(stop_rule.eos_ids, default=0),
            stopping_criteria=[stop_rule],
            **{name: getattr(sampling, name) for name in names},
        )
    return ids[0].tolist()
