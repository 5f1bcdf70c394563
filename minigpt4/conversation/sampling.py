"""Sampling: the settings of a request, and drawing the next token from the LLM's logits."""

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
from minigpt4.models.mini_gpt4_config import PENALTIES

TINY = 1e-6  # logits divided by a still smaller temperature would overflow


@dataclass(frozen=True)
class Sampling:
    """Decoding settings. Order and defaults are those of 2023, whose top_k of 50 was implicit."""

    max_new_tokens: int = 300
    num_beams: int = 1
    min_length: int = 1  # counts BOS, as 2023 did: 1 allows an empty answer
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    length_penalty: float = 1.0  # for beam search
    temperature: float = 1.0  # below TINY: greedy
    max_length: int = 2000  # of prompt and answer together
    top_k: int = 50  # 0: no limit
    do_sample: bool = True
    seed: int | None = None

    def __post_init__(self):
        limits = {  # name -> (lowest, highest); fitting.py checks whether an answer fits the context
            "max_new_tokens": (1, math.inf),
            "max_length": (2, math.inf),
            "num_beams": (1, 64),
            "min_length": (0, math.inf),
            "top_p": (TINY, 1),
            "repetition_penalty": PENALTIES,
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
                object.__setattr__(self, name, int(value))  # sliders send 300.0
        seed = 0 if self.seed is None else self.seed
        if not (isinstance(seed, Integral) and -(2**63) <= seed < 2**63):
            raise ValueError(f"seed: {self.seed!r}; expected a whole number of 64 bits or None")
        if not isinstance(self.do_sample, bool):
            raise ValueError(f"do_sample: {self.do_sample!r}; expected True or False")

    @property
    def is_greedy(self) -> bool:
        """Whether each step takes the most likely token."""
        return not self.do_sample or self.temperature < TINY


class Request(NamedTuple):
    """How to compute one answer or batch of answers; Chat describes the fields."""

    sampling: Sampling
    on_notice: Callable[[str], None]
    cache: PrefixCache | None = None
    stop_event: Event | None = None
    stop_events: Sequence[Event] = ()  # one per row, which ends that row alone
    seeds: Sequence[int | None] = ()  # one per row; without, each row has the seed of `sampling`

    def is_stopped(self, row: int) -> bool:
        """Whether the caller has ended this row."""
        return bool(self.stop_events) and self.stop_events[row].is_set()

    def seed(self, row: int) -> int | None:
        """Return the seed of this row."""
        return self.seeds[row] if self.seeds else self.sampling.seed


_NAMES = [field.name for field in fields(Sampling)]


def request_of(
    sampling: Sequence,
    named: dict[str, Any],
    others: Sequence[str] = (),
    defaults: dict[str, float] | None = None,
) -> Request:
    """Return the Request for an answer's arguments: fields of Sampling, and those of Request that `others` names.

    `defaults` are fields of Sampling for arguments that are not given.
    """
    own = {name: named.pop(name) for name in others if name in named}
    own.setdefault("on_notice", logging.getLogger(__name__).warning)
    for name in _NAMES[len(sampling) :]:
        if defaults and name in defaults:
            named.setdefault(name, defaults[name])
    return Request(Sampling(*sampling, **named), **own)


def filter_logits(
    logits: Tensor, history: Tensor, sampling: Sampling, eos_ids: Iterable[int] = ()
) -> Tensor:
    """Return float32 logits [B, V] with the settings of `sampling` applied; -inf for tokens that are ruled out.

    `history` [B, T] is BOS, if there is one, and the answer so far. Greedy decoding ignores temperature, top-k and top-p.
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
    # top-p keeps a token if those above it have less mass than top_p, so always the first; of NaN logits it keeps none
    kept = (probabilities.cumsum(-1) - probabilities < sampling.top_p).sum(-1, keepdim=True)
    return logits.masked_fill(logits < best.gather(1, (kept - 1).clamp(min=0)), -math.inf)


def own_generator(seed: int | None, device: torch.device) -> torch.Generator:
    """Return a random generator for one answer; without a seed, torch's default CPU generator seeds it.

    Torch's default CUDA generator cannot be used: it refuses to draw while another thread captures a CUDA graph.
    """
    seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
    return torch.Generator(device).manual_seed(seed)


def draw(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Return token ids [B] from filtered logits [B, V], each drawn from its row's generator; greedy without generators.

    A row whose logits are not numbers gives -1: an error here would have to wait for the device.
    """
    if not generators:
        return _place_of_largest(logits)
    probabilities = logits.softmax(-1)
    # Like torch.multinomial, which has one generator for all rows: that of p / Exp(1) with the largest value.
    noise = torch.empty_like(probabilities)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return _place_of_largest(probabilities / noise)


def _place_of_largest(values: Tensor) -> Tensor:
    """Return where each row of [B, V] is largest, -1 if the row holds NaN."""
    places = values.argmax(-1, keepdim=True)  # of NaN, if there is one
    return places.where(~values.gather(-1, places).isnan(), -1)[:, 0]
