"""A frozen LLM that is larger than one GPU: each rank holds a shard of every weight (torch's FSDP2, `fully_shard`).

A part (the embedding, a layer, the output layer, the rest) is gathered before its forward or backward and freed after
it. Contract: all ranks run the same parts in the same order and equally often. A training step does
(`runners/loop.py`); `in_turns` is for passes without backward, of which some ranks may have more than others.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from minigpt4.common.dist_utils import get_world_size, max_over_ranks
from minigpt4.models.llm import quantization
from minigpt4.models.llm.quantised_layers import LAYERS

KINDS = ("none", "int8")  # of quantization.KINDS, those that can be sharded
# The most parts that a rank holds gathered at once: the one that runs, the previous one that is not freed yet, and the
# next one that is prefetched. Source: the order in which FSDP2 prefetches and frees, in forward and in backward.
PARTS_AT_ONCE = 3


def refusal(kind: str) -> str | None:
    """Return why an LLM whose linear layers are of `kind` cannot be sharded, None if it can."""
    if kind == "int8" and torch.__version__ < (2, 12):
        return (
            f"model.llm_quantization int8 cannot be divided among ranks by torch {torch.__version__}, whose shares are "
            "no integers; take torch 2.12 or newer, or model.llm_quantization none"
        )
    if kind not in KINDS:
        known = ", ".join(KINDS)
        return f"model.llm_quantization {kind} cannot be divided among ranks; take one of {known}"
    return None


def parts(llm: nn.Module) -> list[nn.Module]:
    """Return the parts that are gathered one by one: embedding, layers, output layer, and the LLM for the rest."""
    layers = next(
        (part for part in llm.get_decoder().children() if isinstance(part, nn.ModuleList)), ()
    )
    return [llm.get_input_embeddings(), *layers, llm.get_output_embeddings(), llm]


def shard(llm: nn.Module, kind: str, device: torch.device) -> None:
    """Freeze an LLM that is on the CPU, quantise its linear layers to `kind`, and keep this rank's shard on `device`.

    Called by all ranks. At most one whole part is on the device at any time.
    """
    from torch.distributed.device_mesh import init_device_mesh  # takes seconds to import
    from torch.distributed.fsdp import fully_shard

    llm.requires_grad_(False)
    untie(llm)
    mesh = init_device_mesh(device.type, (get_world_size(),))
    for part in parts(llm):
        to_quantise = set(part.modules()) if kind != "none" else set()
        for name, linear in quantization.linears(llm).items():
            if linear in to_quantise:
                llm.set_submodule(name, LAYERS[kind].of(linear.to(device)))
        # explicitly, as the default keeps the outermost module gathered after its forward
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    llm.get_input_embeddings().set_unshard_in_backward(False)  # nothing before it trains
    # FSDP makes the module that runs first the root of all modules in it. That has to be the LLM: a layer that runs
    # without a root would stay gathered after its forward.
    with torch.no_grad():
        llm(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)


def untie(llm: nn.Module) -> None:
    """Give the output layer its own copy of a weight that it shares with the embedding, as each is gathered alone."""
    embedding, output = llm.get_input_embeddings(), llm.get_output_embeddings()
    if output.weight is embedding.weight:
        output.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)


def is_sharded(model: nn.Module) -> bool:
    """Whether `model`, an LLM or a model that has one, is sharded."""
    return hasattr(getattr(model, "llama_model", model), "unshard")  # a method of FSDP2's modules


def gathered(module: nn.Module, function: Callable) -> Callable:
    """Return `function`, wrapped so that the weights of `module`, which it reads, are gathered while it runs.

    If they are sharded it runs as the module's forward, within FSDP's hooks, which gather them for its backward too.
    """
    if not is_sharded(module):
        return function

    def call(*args: Any) -> Any:
        module.forward = function
        try:
            return module(*args)
        finally:
            del module.forward

    return call


def share_bytes(llm: nn.Module, num_shards: int) -> int:
    """Return the bytes that a rank holds between two steps: its shard of the parameters, and all buffers."""
    weights, output = list(llm.parameters()), llm.get_output_embeddings().weight
    if num_shards > 1 and output is llm.get_input_embeddings().weight:  # see `untie`
        weights.append(output)
    # a weight is divided by its first dimension, rounded up
    sizes = [-(-len(weight) // num_shards) * weight[:1].nbytes for weight in weights]
    return sum(sizes) + sum(buffer.nbytes for buffer in llm.buffers())


def gathered_bytes(llm: nn.Module) -> int:
    """Return the most bytes that a step holds in addition to the shards: PARTS_AT_ONCE times the largest part."""
    largest = 0
    for part in parts(llm)[:-1]:
        largest = max(largest, sum(parameter.nbytes for parameter in part.parameters()))
    return PARTS_AT_ONCE * largest


@contextmanager
def in_turns(llm: nn.Module) -> Iterator[None]:
    """Within the block each rank may run the embedding and the LLM, forward only, any number of times.

    Called by all ranks, and no rank leaves the block before all have finished. A rank that runs less than others
    takes part in their gathering. The block must contain no other communication between ranks. An LLM that is not
    sharded is left alone.
    """
    if not is_sharded(llm):
        yield
        return
    embedding, *others = parts(llm)[:-1]
    # Before each call the ranks agree on one, the highest index that any of them requests. These are the parts that a
    # call gathers, in this order: 0 the end of the block, 1 the embedding, 2 the LLM on embeddings.
    gathers = ([], [embedding], [llm, *others])
    device = embedding.weight.device

    def await_turn(request: int, *_: Any) -> None:
        """Take part in the calls of other ranks until the ranks agree on `request`, an index of `gathers`."""
        while (agreed := max_over_ranks(request, device)) != request:
            for part in gathers[agreed]:
                part.unshard()
                part.reshard()

    hooks = []
    for request, module in enumerate((embedding, llm), start=1):
        hooks.append(module.register_forward_pre_hook(partial(await_turn, request), prepend=True))
    try:
        yield
        await_turn(0)
    finally:
        for hook in hooks:
            hook.remove()
