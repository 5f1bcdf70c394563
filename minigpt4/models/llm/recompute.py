"""Activation checkpointing of the LLM: layers keep their input alone and are recomputed for backward.

transformers' own does nothing in evaluation mode, in which a frozen LLM is, and has no place for
the context of packed attention.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from minigpt4.models.llm.language_model import trains

Context = Callable[[], AbstractContextManager]


def recompute(
    function: Callable,
    *args: Any,
    context: Context = nullcontext,
    draws: bool = False,
    **kwargs: Any,
) -> Any:
    """Return ``function(*args, **kwargs)``; what it keeps for backward is recomputed then, inside ``context()``.

    `draws`: random numbers are drawn again as they were, for layers with dropout; a frozen LLM
    draws none.
    """

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), context()

    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=draws,
        context_fn=contexts,
        **kwargs,
    )


@contextmanager
def recompute_layers(llm: nn.Module, context: Context = nullcontext) -> Iterator[None]:
    """`recompute` the layers of a model of transformers that are called inside the block."""
    draws = trains(llm)  # frozen, it is in evaluation mode
    layers = next(part for part in llm.get_decoder().children() if isinstance(part, nn.ModuleList))
    usual = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _wrapped(layer.forward, context, draws)
    try:
        yield
    finally:
        for layer, forward in zip(layers, usual, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _wrapped(forward: Callable, context: Context, draws: bool) -> Callable:
    return lambda *args, **kwargs: recompute(forward, *args, context=context, draws=draws, **kwargs)
