"""Activation checkpointing of the frozen LLM: layers keep their input alone and are computed again for backward."""

from contextlib import contextmanager, nullcontext

from torch import nn
from torch.utils.checkpoint import checkpoint


def again(function, *args, context=nullcontext, **kwargs):
    """Return ``function(*args, **kwargs)``; what it keeps for backward is computed again then, inside ``context()``.

    Random numbers would not be drawn again as they were: a frozen LLM draws none.
    """
    contexts = lambda: (nullcontext(), context())  # noqa: E731
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs)


@contextmanager
def layers_again(llm, context=nullcontext):
    """Let the layers of a model of transformers be computed `again` when they are called inside the block."""
    layers = next(part for part in llm.get_decoder().children() if isinstance(part, nn.ModuleList))
    usual = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _wrapped(layer.forward, context)
    try:
        yield
    finally:
        for layer, forward in zip(layers, usual, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _wrapped(forward, context):
    return lambda *args, **kwargs: again(forward, *args, context=context, **kwargs)
