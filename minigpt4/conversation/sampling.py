"""How an answer is drawn: the settings of a request, and a token by them from the LLM's logits."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from threading import Event
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minigpt4.conversation.prefix_cache import PrefixCache


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
        seed = 0 if self.seed is None else self.seed
        if not (isinstance(seed, Integral) and -(2**63) <= seed < 2**63):
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


# its place among the arguments
_PENALTY = [field.name for field in fields(Sampling)].index("repetition_penalty")


def request_of(
    sampling: Sequence, named: dict[str, Any], others: Sequence[str] = (), penalty: float = 1
) -> Request:
    """Return the Request of an answer's arguments: those of Sampling, and fields of Request, which `others` names.

    `penalty`: of repetition, where they say none. One answer has the model's, those of a batch have none.
    """
    if len(sampling) <= _PENALTY:
        named.setdefault("repetition_penalty", penalty)
    given = {name: named.pop(name) for name in others if name in named}
    given.setdefault("on_notice", logging.getLogger(__name__).warning)
    return Request(Sampling(*sampling, **named), **given)


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


def own_generator(seed: int | None, device: torch.device) -> torch.Generator:
    """Return the generator of one answer. Without a seed it takes one from torch's own generator of the CPU.

    Torch's own generator of a GPU refuses to draw while another thread records its steps.
    """
    seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
    return torch.Generator(device).manual_seed(seed)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Return token ids [B] from filtered logits [B, V]."""
    if sampling.is_greedy:
        return logits.argmax(-1)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
