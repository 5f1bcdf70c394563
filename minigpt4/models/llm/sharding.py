"""A frozen LLM that is larger than a card: every rank holds a share of each weight (torch's FSDP2, `fully_shard`).

A part (the embedding, a layer, the output layer, what is left) is gathered before it runs, forward and backward, and
dropped behind it. Contract: all ranks run the parts in the same order and equally often. A training step does
(`runners/loop.py`); `in_turns` is for passes without backward, of which a rank may have more than another.
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
# Parts that a rank holds whole at once, at most: the one that runs, and what was and will be received for its
# neighbours. Source: FSDP2's order of gathering ahead and freeing, in forward and in backward.
PARTS_AT_ONCE = 3


def refusal(kind: str) -> str | None:
    """Return why an LLM whose linear layers are of `kind` cannot be divided, if it cannot."""
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
    """Return what is gathered one by one: embedding, layers, output layer, the LLM for all that is left."""
    layers = next(
        (part for part in llm.get_decoder().children() if isinstance(part, nn.ModuleList)), ()
    )
    return [llm.get_input_embeddings(), *layers, llm.get_output_embeddings(), llm]


def shard(llm: nn.Module, kind: str, device: torch.device) -> None:
    """Leave on `device` this rank's share of an LLM that is on the CPU, frozen, its linear layers as ones of `kind`.

    Called by all ranks. No more than one part is whole on the device at any time.
    """
    from torch.distributed.device_mesh import init_device_mesh  # seconds that only this needs
    from torch.distributed.fsdp import fully_shard

    llm.requires_grad_(False)
    untie(llm)
    mesh = init_device_mesh(device.type, (get_world_size(),))
    for part in parts(llm):
        within = set(part.modules())
        for name, linear in quantization.linears(llm).items() if kind != "none" else ():
            if linear in within:
                llm.set_submodule(name, LAYERS[kind].of(linear.to(device)))
        # the outermost, too, is dropped behind its forward
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    llm.get_input_embeddings().set_unshard_in_backward(False)  # nothing in front of it trains
    # The module that runs first becomes the root of all in it; a layer without one would stay whole behind its forward.
    with torch.no_grad():
        llm(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)


def untie(llm: nn.Module) -> None:
    """Give the output layer a copy of the weight that it shares with the embedding: each is gathered for itself."""
    embedding, output = llm.get_input_embeddings(), llm.get_output_embeddings()
    if output.weight is embedding.weight:
        output.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)


def is_sharded(model: nn.Module) -> bool:
    """Whether the ranks hold shares of the LLM that a model is or has."""
    return hasattr(getattr(model, "llama_model", model), "unshard")  # of FSDP2's modules


def gathered(module: nn.Module, function: Callable) -> Callable:
    """Return `function`, which reads the weights of `module` outside its forward; sharded ones are whole meanwhile.

    It then runs in the place of the forward, within FSDP's hooks: they gather the weights for its backward, too.
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
    """Return the bytes that a rank holds between two steps: its share of the parameters, and the buffers."""
    weights, output = list(llm.parameters()), llm.get_output_embeddings().weight
    if num_shards > 1 and output is llm.get_input_embeddings().weight:  # see `untie`
        weights.append(output)
    sizes = [-(-len(weight) // num_shards) * weight[:1].nbytes for weight in weights]
    return sum(sizes) + sum(buffer.nbytes for buffer in llm.buffers())


def gathered_bytes(llm: nn.Module) -> int:
    """Return the bytes that a step holds beside the shares, at most: PARTS_AT_ONCE of the largest part."""
    largest = 0
    for part in parts(llm)[:-1]:
        largest = max(largest, sum(parameter.nbytes for parameter in part.parameters()))
    return PARTS_AT_ONCE * largest


@contextmanager
def in_turns(llm: nn.Module) -> Iterator[None]:
    """Within the block a rank runs the LLM forward, of embeddings, as often as it has to; the others lend their shares.

    Called by all ranks, for which the block ends together; no other exchange may be in it. An LLM that is not sharded
    is left alone.
    """
    if not is_sharded(llm):
        yield
        return
    embedding, *others = parts(llm)[:-1]
    # what a call gathers, in that order: of nothing, of the embedding, of the LLM
    calls = ([], [embedding], [llm, *others])
    device = embedding.weight.device

    def await_turn(wish: int, *_: Any) -> None:
        """Lend until all ranks that want a call want the same as this one; `wish`: an index of `calls`."""
        while (agreed := max_over_ranks(wish, device)) != wish:
            for part in calls[agreed]:
                part.unshard()
                part.reshard()

    hooks = []
    for wish, module in enumerate((embedding, llm), start=1):
        hooks.append(module.register_forward_pre_hook(partial(await_turn, wish), prepend=True))
    try:
        yield
        await_turn(0)
    finally:
        for hook in hooks:
            hook.remove()
