"""Activation checkpointing of the LLM: a layer saves only its input and is recomputed in backward.

That of transformers does nothing in evaluation mode, which a frozen LLM is in, and cannot enter the context of packed
attention for the recomputation.
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
    """Return ``function(*args, **kwargs)``; what it would save for backward is recomputed then, inside ``context()``.

    `draws`: restore the random state for the recomputation, which layers with dropout need; a frozen LLM has none.
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
    """Within the block the layers of a model of transformers are checkpointed, by `recompute`."""
    draws = trains(llm)  # a frozen LLM is in evaluation mode, without dropout
    layers = next(part for part in llm.get_decoder().children() if isinstance(part, nn.ModuleList))
    # a `forward` set on the layer itself, such as by accelerate, is put back afterwards
    originals = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _wrapped(layer.forward, context, draws)
    try:
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            del layer.forward
            if original is not None:
                layer.forward = original


def _wrapped(forward: Callable, context: Context, draws: bool) -> Callable:
    return lambda *args, **kwargs: recompute(forward, *args, context=context, draws=draws, **kwargs)
