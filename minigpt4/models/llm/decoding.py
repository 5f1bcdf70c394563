"""How a chat runs the LLM: prefill and decoding steps over a KV cache; on a GPU the steps are replayed as a CUDA graph.

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

MOST_STATIC = 4096  # positions for which StaticSteps reserves memory at most; each step attends to all of them
CHUNK = 128  # positions by which the buffers of the KV cache grow
# the argument of `forward` that takes the KV cache, since transformers 5.24 and before
CACHE_NAMES = ("cache", "past_key_values")


class InPlaceLayer(DynamicLayer):
    """The KV cache of one layer: `keys` and `values` are views of the filled positions of larger buffers.

    It relies on the base class to change these two only by slicing off the end, so that they remain such views.
    """

    buffers = (None, None)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values, [B, H, T, d] each; return all of them so far."""
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = _append_to_buffer(self.buffers[0], self.keys, key_states, start)
        values = _append_to_buffer(self.buffers[1], self.values, value_states, start)
        self.buffers = (keys, values)
        return self._set_views(start + key_states.shape[-2])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows of the batch."""
        end = self.get_seq_length()
        self.buffers = tuple(buffer[indices] for buffer in self.buffers)
        self._set_views(end)

    def _set_views(self, end: int) -> tuple[Tensor, Tensor]:
        """Set `keys` and `values` to the first `end` positions of the buffers, and return them."""
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values


def _append_to_buffer(buffer: Tensor | None, filled: Tensor, new: Tensor, start: int) -> Tensor:
    """Return a buffer with `filled` (`start` positions), then `new`: the given one if it is large enough."""
    end = start + new.shape[-2]
    if buffer is None or buffer.shape[-2] < end:
        buffer = new.new_empty(*new.shape[:2], -(-end // CHUNK) * CHUNK, new.shape[-1])
        if start:
            buffer[:, :, :start] = filled
    buffer[:, :, start:end] = new
    return buffer


class FixedLayer(DynamicLayer):
    """The KV cache of one layer in buffers of fixed size; a step writes at `position`, a tensor [1]."""

    def __init__(self, position: Tensor):
        super().__init__()
        self.position = position

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values, [B, H, 1, d] each, at `position`; return the whole buffers."""
        self.keys.index_copy_(2, self.position, key_states)
        self.values.index_copy_(2, self.position, value_states)
        return self.keys, self.values


def cache_name(llm: nn.Module) -> str:
    """Return the name of the argument of `llm.forward` that takes the KV cache. Raises ValueError if none does."""
    for module in llm.modules():
        parameters = inspect.signature(module.forward).parameters
        for name in CACHE_NAMES:
            if name in parameters:
                return name
        # a wrapper with **kwargs, such as peft's, passes the cache on to a module inside it
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    raise ValueError(
        f"model.llama_model: a chat needs an LLM that takes keys and values as {' or '.join(CACHE_NAMES)}; "
        f"{type(llm).__name__}.forward takes {', '.join(inspect.signature(llm.forward).parameters)}"
    )


class TransformersToken:
    """Runs any LLM of transformers for one token of one row, with a KV cache in buffers of `size` positions."""

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
        """Copy `past`, of `end` positions, into the buffers."""
        for mine, theirs in zip(self.cache.layers, past.layers, strict=True):
            mine.keys[:, :, :end] = theirs.keys
            mine.values[:, :, :end] = theirs.values

    def store(self, past: DynamicCache, new: slice) -> None:
        """Append the positions `new` of the buffers to `past`."""
        for mine, theirs in zip(self.cache.layers, past.layers, strict=True):
            theirs.update(mine.keys[:, :, new], mine.values[:, :, new])

    def logits(self, token: Tensor, position: Tensor) -> Tensor:
        """Return the logits [1, V] of `token` [1] at `position` [1], the first that is not filled yet."""
        self.position.copy_(position)
        dtype = self.cache.layers[0].keys.dtype
        mask = torch.zeros(len(self.slots), dtype=dtype, device=self.slots.device)
        mask = mask.masked_fill(self.slots > position, torch.finfo(dtype).min)[None, None, None]
        inputs = {"input_ids": token[None], "position_ids": position[None], "attention_mask": mask}
        return self.llm(**inputs, **{self.cache_name: self.cache}, use_cache=True).logits[:, -1]


class StaticSteps:
    """Decoding steps of one row over buffers of `size` positions, recorded as a CUDA graph on a GPU."""

    def __init__(self, llm: nn.Module, past: DynamicCache, size: int):
        device = llm.get_input_embeddings().weight.device
        self.size, self.graph = size, None
        runner = lean_token.LeanToken if lean_token.fits(llm) else TransformersToken
        self.runner = runner(llm, past, size)
        self.token = torch.zeros(1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        if device.type == "cuda":
            (self.graph,) = record(device, self._run, warm_ups=3)

    def _run(self) -> None:
        self.logits = self.runner.logits(self.token, self.position)

    def load(self, past: DynamicCache) -> None:
        """Start after the positions of `past`."""
        self.begin = self.end = past.get_seq_length()
        self.runner.load(past, self.end)

    def store(self, past: DynamicCache) -> None:
        """Append the positions computed since `load` to `past`."""
        self.runner.store(past, slice(self.begin, self.end))

    def step(self, tokens: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Return the logits [1, V] of the next position, valid until the next step.

        `positions` and `mask` are not used: one row needs no mask, and its position is known.
        """
        self.token.copy_(tokens)
        self.position.fill_(self.end)
        if self.graph is None:
            self._run()
        else:
            self.graph.replay()
        self.end += 1
        return self.logits


def new_past(llm: nn.Module, layer: Callable[[], DynamicLayer] = InPlaceLayer) -> DynamicCache:
    """Return an empty KV cache for `llm`: `layer()` for each layer with full attention, transformers' own for others."""
    past = DynamicCache(config=llm.config)
    past.layers = [layer() if type(own) is DynamicLayer else own for own in past.layers]
    return past


class Decoder:
    """Runs one LLM for many sessions, each of which has its own KV cache.

    `static`: whether decoding steps of one row use StaticSteps; the default is on a GPU only. It needs full attention
    in all layers, on one device. There is one StaticSteps: while it is in use, other answers take plain steps.
    """

    def __init__(self, llm: nn.Module, static: bool | None = None):
        self.llm, self.cache_name = llm, cache_name(llm)
        has_full_attention = all(isinstance(layer, InPlaceLayer) for layer in new_past(llm).layers)
        is_on_one_device = len(set(getattr(llm, "hf_device_map", {}).values())) < 2
        is_wanted = llm.get_input_embeddings().weight.is_cuda if static is None else static
        self.static = has_full_attention and is_on_one_device and is_wanted
        self._steps, self._lock = None, threading.Lock()

    def new_past(self) -> DynamicCache:
        """Return an empty KV cache."""
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

        `past` must not grow beyond `longest` positions. It is complete only when the context ends.
        """
        with ExitStack() as at_exit:
            step = partial(self._plain_step, past)
            # the lock is not waited for: if another answer uses the static buffers, this one takes plain steps
            is_fitting = self.static and num_rows == 1 and longest <= MOST_STATIC
            if is_fitting and self._lock.acquire(blocking=False):
                at_exit.callback(self._lock.release)
                steps = self._static_steps(past, longest)
                if steps is not None:
                    steps.load(past)
                    at_exit.callback(steps.store, past)
                    step = steps.step
            yield step

    def _static_steps(self, past: DynamicCache, longest: int) -> StaticSteps | None:
        """Return StaticSteps with room for `longest` positions; None if there is no memory or no way to record the step."""
        if self._steps is None or self._steps.size < longest:
            self._steps = None  # free its memory before the larger one is allocated
            size = 1 << max(longest - 1, 511).bit_length()  # a power of two, at least 512
            try:
                self._steps = StaticSteps(self.llm, past, size)
            except torch.OutOfMemoryError:
                return None  # a shorter answer may find room
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
        """Run the LLM over `count` new positions; return the logits [B, V] of the last one.

        Raises ValueError if the LLM did not add them to `past`: it would answer without the context.
        """
        expected = past.get_seq_length() + count
        logits = self.llm(**inputs, **{self.cache_name: past}, use_cache=True).logits[:, -1]
        length = past.get_seq_length()
        if length != expected:
            raise ValueError(
                f"model.llama_model: {type(self.llm).__name__} was given {count} positions, its keys and values then "
                f"have {length}, expected {expected}; take another LLM or version of transformers"
            )
        return logits
