"""Decoding: which token comes next, when an answer ends, and what is kept for the next turn.

An own loop rather than `generate` of transformers: tokens are yielded as they come (no thread, so
closing the generator stops the work and errors reach the caller), sampling draws from a generator
of its own, and the keys and values of a conversation live on between turns. Beam search is
`generate`'s.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.common.device import send, shared_generators
from minigpt4.conversation.context import Context
from minigpt4.conversation.prefix_cache import PrefixCache

if TYPE_CHECKING:  # transformers takes seconds to import
    from minigpt4.models.llm.decoding import Decoder

MOST_OPEN = 3 / 4  # of a batch's rows: from there on those that have ended are computed no further


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn; order and defaults are 2023's (its top_k of 50 was unsaid)."""

    max_new_tokens: int = 300
    num_beams: int = 1
    min_length: int = 1  # counts BOS, as 2023 did: 1 allows an empty answer
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0  # of beams
    temperature: float = 1.0  # 0: greedy
    max_length: int = 2000  # of prompt and answer together
    top_k: int = 50  # 0: all
    do_sample: bool = True
    seed: int | None = None

    def __post_init__(self):
        limits = {  # name -> (lowest, highest); the chat knows whether an answer fits the context
            "max_new_tokens": (1, math.inf),
            "max_length": (2, math.inf),
            "num_beams": (1, 64),
            "min_length": (0, math.inf),
            "top_p": (1e-6, 1),
            "repetition_penalty": (1e-3, 1e3),
            "length_penalty": (-1e3, 1e3),
            "temperature": (0, 1e3),
            "top_k": (0, math.inf),
        }
        for name, (lowest, highest) in limits.items():
            value = getattr(self, name)
            if not (isinstance(value, Real) and lowest <= value <= highest):  # also refuses NaN
                raise ValueError(f"{name}: {value!r}; expected a number from {lowest} to {highest}")
            if isinstance(getattr(type(self), name), int):
                if value == math.inf or value != int(value):
                    raise ValueError(f"{name}: {value!r}; expected a whole number")
                object.__setattr__(self, name, int(value))  # a slider's 300.0
        if not (
            self.seed is None or (isinstance(self.seed, Integral) and -(2**63) <= self.seed < 2**63)
        ):
            raise ValueError(f"seed: {self.seed!r}; expected a whole number of 64 bits or None")
        if not isinstance(self.do_sample, bool):
            raise ValueError(f"do_sample: {self.do_sample!r}; expected True or False")

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return not self.do_sample or self.temperature == 0


class Request(NamedTuple):
    """How one answer, or batch of them, is to be computed; see Chat."""

    sampling: Sampling
    on_notice: Callable[[str], None]
    cache: PrefixCache | None = None
    stop_event: Event | None = None
    stop_events: Sequence[Event] = ()  # one a row, which ends that row alone

    def is_stopped(self, row: int) -> bool:
        """Whether the caller has ended this row."""
        return bool(self.stop_events) and self.stop_events[row].is_set()


_PENALTY = [each.name for each in fields(Sampling)].index(
    "repetition_penalty"
)  # its place among the arguments


def request_of(
    sampling: Sequence, named: dict[str, Any], others: Sequence[str] = (), penalty: float = 1
) -> Request:
    """Return the Request of an answer's arguments: those of Sampling, and fields of Request, which `others` names.

    `penalty`: of repetition, where they say none. One answer has the model's, those of a batch have none.
    """
    if len(sampling) <= _PENALTY:
        named.setdefault("repetition_penalty", penalty)
    given = {name: named.pop(name) for name in others if name in named}
    return Request(
        Sampling(*sampling, **named), **{"on_notice": logging.getLogger(__name__).warning} | given
    )


def filter_logits(
    logits: Tensor, history: Tensor, sampling: Sampling, eos_ids: Iterable[int] = ()
) -> Tensor:
    """Return logits [B, V] in float32 after all of `sampling`; -inf is removed.

    `history` [B, T] starts with BOS, if there is one. A greedy choice ignores temperature, top-k and top-p.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1.0:
        seen = logits.gather(1, history)
        penalty = sampling.repetition_penalty
        logits = logits.scatter(1, history, torch.where(seen < 0, seen * penalty, seen / penalty))
    if history.shape[1] < sampling.min_length:
        logits[:, list(eos_ids)] = -math.inf
    if sampling.is_greedy:
        return logits
    logits = logits / sampling.temperature
    size = logits.shape[1]
    best = logits.topk(min(sampling.top_k or size, size)).values  # descending
    probabilities = best.softmax(-1)
    # what stands above a token has less mass than top_p: it stays; the best one always does
    kept = (probabilities.cumsum(-1) - probabilities < sampling.top_p).sum(-1, keepdim=True)
    return logits.masked_fill(logits < best.gather(1, kept - 1), -math.inf)


class StoppingCriteriaSub:
    """Ends the rows whose last tokens equal one of `stops` (id sequences); 2023's name."""

    def __init__(self, stops: Iterable = (), encounters: int = 1):
        self.stops = [torch.as_tensor(stop).flatten().tolist() for stop in stops]

    def __call__(self, input_ids: Tensor, scores: Any = None, **kwargs: Any) -> Tensor:
        """Return bool [B] for token ids [B, T]."""
        ended = list(map(self._ends, input_ids.tolist()))
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)

    def _ends(self, row: list[int]) -> bool:
        return any(stop and row[-len(stop) :] == stop for stop in self.stops)


class StopRule:
    """Which rows end: by an end token, a stop string, the caller's criteria, the stop event."""

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
        # a token is at least a byte, so the string that a new token completes lies within these
        self.tail = max((len(string.encode()) for string in strings), default=0) + 1

    def __call__(self, new_ids: Tensor, scores: Any = None, **kwargs: Any) -> Tensor:
        """Return bool [B] for the answers so far, [B, T]; `generate` takes it too."""
        ended = self.ended(new_ids[:, -self.tail :].tolist(), new_ids, scores)
        return torch.tensor(ended, dtype=torch.bool, device=new_ids.device)

    def ended(self, rows: Sequence[list[int]], new_ids: Tensor, scores: Any = None) -> list[bool]:
        """Return which of the answers so far end: `rows`, or their last tokens, which also lie in `new_ids` [B, T].

        Waits for the device of `new_ids` only where there are criteria.
        """
        is_stopped = self.event is not None and self.event.is_set()
        ended = [is_stopped or self._ends(row[-self.tail :]) for row in rows]
        for criterion in self.criteria:
            found = torch.as_tensor(criterion(new_ids, scores)).expand(len(rows)).tolist()
            ended = [a or b for a, b in zip(ended, found, strict=True)]
        return ended

    def _ends(self, row: list[int]) -> bool:
        """Whether the last token is an end token, or a stop string is among the last ones."""
        if row[-1] in self.eos_ids:
            return True
        text = self.tokenizer.decode(row) if self.strings else ""
        return any(string in text for string in self.strings)


def padded_batch(
    llm: nn.Module, contexts: Sequence[Context], reused: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return (embeddings [B, T, D], mask [B, T] or None, positions [B, T]), padded on the left.

    The first `reused` positions are left out: they are in the cache (of one row).
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
    """What one row of a batch has written, and whether it goes on."""

    row: int
    max_new_tokens: int
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
    """Yield [(row, token)] of the rows that are still open, step by step until every row has ended.

    Rows keep their own positions, so that a batch gives the answers of its members alone. A cache
    is for one row; it keeps what was computed also when the caller closes the generator.
    """
    sampling, cache = request.sampling, request.cache
    # what the last turn left, and what is new
    past, reused = cache.take(contexts[0]) if cache is not None else (None, 0)
    past = decoder.new_past() if past is None else past
    embeds, *where = padded_batch(decoder.llm, contexts, reused)
    mask, positions = where
    device, num_rows = embeds.device, len(contexts)
    longest = reused + embeds.shape[1] + max(context.max_new_tokens for context in contexts)
    generator = None if sampling.is_greedy else own_generator(sampling.seed, device)
    # what rows have written: on the device behind BOS, and here, where it is decided which of them go on
    start = 0 if bos_id is None else 1
    history = torch.full((num_rows, start), bos_id or 0, device=device)
    if not start:  # min_length counts BOS
        sampling = replace(sampling, min_length=max(sampling.min_length - 1, 0))
    answers = [_Answer(row, context.max_new_tokens) for row, context in enumerate(contexts)]
    try:
        logits = decoder.prefill(past, embeds, positions, mask)
        with decoder.steps(past, num_rows, longest) as step:
            while True:
                tokens = draw(
                    filter_logits(logits, history, sampling, stop_rule.eos_ids), sampling, generator
                )
                history = torch.cat([history, tokens[:, None]], 1)
                for answer, token in zip(
                    answers, tokens.tolist(), strict=True
                ):  # the one wait of a step
                    answer.ids.append(token)
                yield [(answer.row, answer.ids[-1]) for answer in answers if answer.is_open]
                ended = stop_rule.ended([answer.ids for answer in answers], history[:, start:])
                for answer, has_ended in zip(answers, ended, strict=True):
                    is_full = len(answer.ids) >= answer.max_new_tokens
                    answer.is_open &= not (has_ended or is_full or request.is_stopped(answer.row))
                kept = [place for place, answer in enumerate(answers) if answer.is_open]
                if not kept:
                    return
                positions = positions[:, -1:] + 1
                mask = None if mask is None else F.pad(mask, (0, 1), value=1)
                # rows that have ended are dropped, when there are enough of them to be worth it
                if len(kept) <= MOST_OPEN * len(answers):
                    answers, (index,) = (
                        [answers[place] for place in kept],
                        send(kept, device=device),
                    )
                    past.batch_select_indices(index)
                    mask = None if mask is None else mask[index]
                    tokens, history = tokens[index], history[index]
                    positions = positions[index]
                logits = step(tokens, positions, mask)
    finally:
        if cache is not None:
            cache.put(past, contexts[0], answers[0].ids)


def own_generator(seed: int | None, device: torch.device) -> torch.Generator:
    """Return the generator of one answer. Without a seed it takes one from torch's own generator of the CPU.

    Torch's own generator of a GPU refuses to draw while another thread records its steps.
    """
    return torch.Generator(device).manual_seed(
        int(torch.randint(2**63 - 1, ())) if seed is None else seed
    )


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Return token ids [B] from filtered logits [B, V]."""
    if sampling.is_greedy:
        return logits.argmax(-1)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def beam_search(
    llm: nn.Module, context: Context, sampling: Sampling, stop_rule: StopRule
) -> list[int]:
    """Return the token ids of the best beam."""
    embeds = context.embeds(llm.get_input_embeddings())
    drawing = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
    }
    # `generate` draws from torch's own generators: one search at a time, so that each has its seed
    drawing_alone = nullcontext() if sampling.is_greedy else shared_generators
    devices = [embeds.device] if embeds.is_cuda else []
    with drawing_alone, torch.random.fork_rng(devices, enabled=sampling.seed is not None):
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
            **({} if sampling.is_greedy else drawing),
        )
    return ids[0].tolist()
