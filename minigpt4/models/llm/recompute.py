"""Activation checkpointing of the frozen LLM: layers keep their input alone and are computed again for backward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from torch import nn
from torch.utils.checkpoint import checkpoint


def again(function: Callable, *args, context: Callable = nullcontext, draws: bool = False, **kwargs):
    """Return ``function(*args, **kwargs)``; what it keeps for backward is computed again then, inside ``context()``.

    `draws`: random numbers are drawn again as they were, for layers with dropout; a frozen LLM draws none.
    """

    def contexts() -> tuple:
        return nullcontext(), context()

    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=draws, context_fn=contexts, **kwargs)


@contextmanager
def layers_again(llm: nn.Module, context: Callable = nullcontext) -> Iterator[None]:
    """Let the layers of a model of transformers be computed `again` when they are called inside the block."""
    draws = any(parameter.requires_grad for parameter in llm.parameters())  # frozen, it is in evaluation mode
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


def _wrapped(forward: Callable, context: Callable, draws: bool) -> Callable:
    return lambda *args, **kwargs: again(forward, *args, context=context, draws=draws, **kwargs)
