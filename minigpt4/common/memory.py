"""Memory that a computation would take, counted with tensors that have shapes and no values: no weights, no GPU.

Counted is what torch.cuda.max_memory_allocated would report: every storage that is alive at once, rounded up as CUDA's
caching allocator rounds. What it does not know is in OUTSIDE.
"""

import weakref
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROUNDING = 512  # bytes. Source: kMinBlockSize of PyTorch's CUDACachingAllocator
# Bytes that a card must have beyond those counted: CUDA's context and kernels, workspaces of cuBLAS, gaps between
# tensors. An assumption, not measured.
OUTSIDE = 3 * 2**28


class MemoryCounter(TorchDispatchMode):
    """Follows all tensors that come into being in its block; `now` and `peak` in bytes, `launches`: kernels started.

    A kernel is an operation that fills memory: views and bare allocations are none.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.launches = 0
        self._alive = {}  # address of a storage -> weak reference that ends its entry

    def hold(self, tensors):
        """Count tensors that were there before."""
        for tensor in tensors:
            self._hold(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_new = [self._hold(leaf) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.launches += func._schema.is_mutable or (any(is_new) and "empty" not in func._schema.name)
        return out

    def _hold(self, tensor):
        """Return whether the tensor's storage was not known."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, -(-storage.nbytes() // ROUNDING) * ROUNDING
        if address in self._alive:
            return False

        def release(_):
            del self._alive[address]
            self.now -= size

        self._alive[address] = weakref.ref(storage, release)
        self.now += size
        self.peak = max(self.peak, self.now)
        return True


@contextmanager
def without_values(model):
    """Give `model`, on the meta device, tensors without values inside the block, where all tensors are such.

    They say that they lie on the CPU: backward asks a GPU's driver, which may not be there.
    """
    fakes = {}

    def fake(tensor):
        if id(tensor) not in fakes:
            made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            fakes[id(tensor)] = torch.nn.Parameter(made, tensor.requires_grad) if is_parameter else made
        return fakes[id(tensor)]

    with FakeTensorMode():
        for part in model.modules():
            for tensors in (part._parameters, part._buffers):
                tensors.update({name: fake(tensor) for name, tensor in tensors.items() if tensor is not None})
        yield model
