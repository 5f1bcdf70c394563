"""CUDA graphs emulated on a CPU: a capture notes operators and their tensors, a replay runs them on the same memory.

So a replay reads what it would read on a GPU: a value that was not computed from the inputs inside the graph stays what it
was. Not emulated: memory that several graphs share.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minigpt4.common import cuda_graphs


class Graph(TorchDispatchMode):
    """The operators that ran inside the block."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operator is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        found = operator(*args, **kwargs)
        self.calls.append((operator, args, kwargs, found))
        return found

    @torch.no_grad()
    def replay(self):
        for operator, args, kwargs, found in self.calls:
            inputs = [each for each in tree_leaves((args, kwargs)) if torch.is_tensor(each)]
            memory = {each.untyped_storage().data_ptr() for each in inputs}
            new = operator(*args, **kwargs)
            for mine, theirs in zip(tree_leaves(found), tree_leaves(new), strict=True):
                # neither a view of an input, nor an input that the operator has changed
                if torch.is_tensor(mine) and mine.untyped_storage().data_ptr() not in memory:
                    mine.copy_(theirs)


def record(device, *functions, warm_ups, pool=None):
    graphs = [Graph() for _ in functions]
    for _ in range(warm_ups):
        for function in functions:
            function()
    for graph, function in zip(graphs, functions, strict=True):
        with graph:
            function()
    return graphs


@contextmanager
def emulated(monkeypatch):
    """Inside the block, Recorders on a CPU record."""
    with monkeypatch.context() as patch:
        patch.setattr(cuda_graphs, "record", record)
        patch.setattr(cuda_graphs, "_can_record", lambda tensor: True)
        for needs_gpu in ("_begin_step", "_check_room"):
            patch.setattr(cuda_graphs.Recorder, needs_gpu, lambda self, device: None)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        yield
