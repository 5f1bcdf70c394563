"""How the chat runs the LLM: keys and values in place, steps that a GPU replays as a graph.

Shapes: B rows, H key heads, T positions, d head width, D LLM width, V vocabulary.
"""

import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from minigpt4.common.cuda_graphs import record
from minigpt4.models.llm import lean_token

CHUNK = 128  # positions by which the room for keys and values grows
CACHE_NAMES = ("cache", "past_key_values")  # in `forward`, since transformers 5.24 and before


class InPlaceLayer(DynamicLayer):
    """One layer's keys and values: `keys` and `values` are the filled beginnings of larger buffers.

    Contract with the base class: all else that it does to the two is to shorten them by slicing:
    they stay beginnings.
    """

    buffers = (None, None)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [B, H, T, d] each; return all keys and values so far."""
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = _appended(self.buffers[0], self.keys, key_states, start)
        values = _appended(self.buffers[1], self.values, value_states, start)
        self.buffers = (keys, values)
        return self._show(start + key_states.shape[-2])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only."""
        end = self.get_seq_length()
        self.buffers = tuple(buffer[indices] for buffer in self.buffers)
        self._show(end)

    def _show(self, end: int) -> tuple[Tensor, Tensor]:
        """Let `keys` and `values` be the first `end` positions of the buffers; return them."""
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values


def _appended(buffer: Tensor | None, filled: Tensor, new: Tensor, start: int) -> Tensor:
    """Return a buffer of `filled` (`start` positions) and `new`: the same one if it is large enough."""
    end = start + new.shape[-2]
    if buffer is None or buffer.shape[-2] < end:
        buffer = new.new_empty(*new.shape[:2], -(-end // CHUNK) * CHUNK, new.shape[-1])
        if start:
            buffer[:, :, :start] = filled
    buffer[:, :, start:end] = new
    return buffer


class FixedLayer(DynamicLayer):
    """One layer's keys and values in buffers of fixed size; a step writes at `position`, a tensor [1]."""

    def __init__(self, position: Tensor):
        super().__init__()
        self.position = position

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B, H, 1, d] each at `position`; return the whole buffers."""
        self.keys.index_copy_(2, self.position, key_states)
        self.values.index_copy_(2, self.position, value_states)
        return self.keys, self.values


def cache_name(llm: nn.Module) -> str:
    """Return the argument of `llm.forward` that takes a cache. Raises ValueError if none does."""
    for module in llm.modules():
        parameters = inspect.signature(module.forward).parameters
        for name in CACHE_NAMES:
            if name in parameters:
                return name
        # a wrapper, such as peft's, hands on what it does not name to a model within it
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    raise ValueError(
        f"model.llama_model: a chat needs an LLM that takes keys and values as {' or '.join(CACHE_NAMES)}; "
        f"{type(llm).__name__}.forward takes {', '.join(inspect.signature(llm.forward).parameters)}"
    )


class WholeToken:
    """Any LLM of transformers for one token of one row, over keys and values in buffers of `size` positions."""

    def __init__(self, llm: nn.Module, past: DynamicCache, size: int):
        device = llm.get_input_embeddings().weight.device
        self.llm, self.cache_name = llm, cache_name(llm)
        self.slots = torch.arange(size, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.cache = new_past(llm, partial(FixedLayer, self.position))
        for mine, theirs in zip(self.cache.layers, past.layers, strict=True):
            mine.keys, mine.values = (
                tensor.new_zeros(1, tensor.shape[1], size, tensor.shape[3])
                for tensor in (theirs.keys, theirs.values)
            )
            mine.is_initialized = True

    def load(self, past: DynamicCache, end: int) -> None:
        """Take the `end` positions of `past`."""
        for mine, theirs in zip(self.cache.layers, past.layers, strict=True):
            mine.keys[:, :, :end] = theirs.keys
            mine.values[:, :, :end] = theirs.values

    def store(self, past: DynamicCache, new: slice) -> None:
        """Append the positions `new` to `past`."""
        for mine, theirs in zip(self.cache.layers, past.layers, strict=True):
            theirs.update(mine.keys[:, :, new], mine.values[:, :, new])

    def logits(self, token: Tensor, position: Tensor) -> Tensor:
        """Return logits [1, V] of `token` [1] at `position` [1], behind which no position is filled."""
        self.position.copy_(position)
        dtype = self.cache.layers[0].keys.dtype
        mask = torch.zeros(len(self.slots), dtype=dtype, device=self.slots.device)
        mask = mask.masked_fill(self.slots > position, torch.finfo(dtype).min)[None, None, None]
        inputs = {"input_ids": token[None], "position_ids": position[None], "attention_mask": mask}
        return self.llm(**inputs, **{self.cache_name: self.cache}, use_cache=True).logits[:, -1]


class StaticSteps:
    """Steps of one row over `size` positions: the same kernels and addresses at every token."""

    def __init__(self, llm: nn.Module, past: DynamicCache, size: int):
        device = llm.get_input_embeddings().weight.device
        self.size, self.graph = size, None
        self.one = (lean_token.LeanToken if lean_token.fits(llm) else WholeToken)(llm, past, size)
        self.token = torch.zeros(1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        if device.type == "cuda":
            (self.graph,) = record(device, self._next, warm_ups=3)

    def _next(self) -> None:
        self.logits = self.one.logits(self.token, self.position)

    def load(self, past: DynamicCache) -> None:
        """Begin after `past`."""
        self.begin = self.end = past.get_seq_length()
        self.one.load(past, self.end)

    def store(self, past: DynamicCache) -> None:
        """Append to `past` what was computed since `load`."""
        self.one.store(past, slice(self.begin, self.end))

    def step(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Return logits [1, V], valid until the next step."""
        self.token.copy_(tokens)
        self.position.fill_(self.end)
        if self.graph is None:
            self._next()
        else:
            self.graph.replay()
        self.end += 1
        return self.logits


def new_past(llm: nn.Module, layer: Callable[[], DynamicLayer] = InPlaceLayer) -> DynamicCache:
    """Return an empty cache for `llm`; `layer()` where everything is attended to, else transformers'."""
    past = DynamicCache(config=llm.config)
    past.layers = [layer() if type(own) is DynamicLayer else own for own in past.layers]
    return past


class Decoder:
    """Runs one LLM for many sessions, each with keys and values of its own.

    `static`: steps of one row use buffers of fixed size, recorded as a CUDA graph; by default where
    a GPU is there, all layers lie on it, and each attends to everything. A second answer at the same time takes the
    plain steps.
    """

    def __init__(self, llm: nn.Module, static: bool | None = None):
        self.llm, self.cache_name = llm, cache_name(llm)
        can = all(isinstance(layer, InPlaceLayer) for layer in new_past(llm).layers)
        can &= len(set(getattr(llm, "hf_device_map", {}).values())) < 2  # a graph is of one device
        is_cuda = llm.get_input_embeddings().weight.is_cuda
        self.static = can and (is_cuda if static is None else static)
        self._steps, self._lock = None, threading.Lock()

    def new_past(self) -> DynamicCache:
        """Return empty keys and values."""
        return new_past(self.llm)

    def prefill(
        self, past: DynamicCache, embeds: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Append embeddings [B, T, D] to `past`; return the last position's logits [B, V]. Raises as `_append`."""
        inputs = {
            "inputs_embeds": embeds,
            "position_ids": positions,
            "attention_mask": mask,
            "logits_to_keep": 1,
        }
        return self._append(past, embeds.shape[1], inputs)

    @contextmanager
    def steps(
        self, past: DynamicCache, num_rows: int, longest: int
    ) -> Iterator[Callable[..., Tensor]]:
        """Yield a function (tokens [B], positions [B, 1], mask [B, T] or None) -> next logits [B, V].

        `past` has all that was computed when the context ends; it will not grow beyond `longest`
        positions.
        """
        with ExitStack() as at_end:
            step = partial(self._plain_step, past)
            # an answer that comes while another uses the buffers takes the plain steps
            if self.static and num_rows == 1 and self._lock.acquire(blocking=False):
                at_end.callback(self._lock.release)
                if steps := self._sized(past, longest):
                    steps.load(past)
                    at_end.callback(steps.store, past)
                    step = steps.step
            yield step

    def _sized(self, past: DynamicCache, longest: int) -> StaticSteps | None:
        """Return StaticSteps that hold `longest` positions; None if they cannot be recorded."""
        if self._steps is None or self._steps.size < longest:
            self._steps = None  # its memory is free before the new one takes some
            try:
                self._steps = StaticSteps(self.llm, past, 1 << max(longest - 1, 511).bit_length())
            except RuntimeError as error:
                self.static = False
                logging.warning(
                    "chat: the decoding step cannot be recorded (%s); answers come without it",
                    error,
                )
        return self._steps

    def _plain_step(
        self, past: DynamicCache, tokens: Tensor, positions: Tensor, mask: Tensor | None
    ) -> Tensor:
        inputs = {"input_ids": tokens[:, None], "position_ids": positions, "attention_mask": mask}
        return self._append(past, 1, inputs)

    def _append(self, past: DynamicCache, count: int, inputs: dict[str, Any]) -> Tensor:
        """Run the LLM over `count` new positions; return the last one's logits [B, V].

        Raises ValueError if the LLM did not add them to `past`: its answers would forget what came before.
        """
        expected = past.get_seq_length() + count
        logits = self.llm(**inputs, **{self.cache_name: past}, use_cache=True).logits[:, -1]
        if (length := past.get_seq_length()) != expected:
            raise ValueError(
                f"model.llama_model: {type(self.llm).__name__} was given {count} positions, its keys and values then "
                f"have {length}, expected {expected}; take another LLM or version of transformers"
            )
        return logits
