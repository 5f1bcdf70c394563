"""The memory of a training step, counted with tensors that have shapes but no values: needs no weights and no GPU.

The count is what torch.cuda.max_memory_allocated would report: all storages that are alive at the same time, each
rounded up like CUDA's caching allocator does. Memory outside that allocator is estimated by OUTSIDE.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minigpt4.models.base_model import resolve_compute_dtype
from minigpt4.models.llm import quantization
from minigpt4.models.llm.counting import as_on_gpu
from minigpt4.text.prompts import read_prompts
from minigpt4.text.segments import IMAGE_SLOT

ROUNDING = 512  # bytes. Source: kMinBlockSize of PyTorch's CUDACachingAllocator
# Bytes that a GPU needs in addition to the count: CUDA's context and kernels, cuBLAS workspaces, fragmentation. An
# assumption, not measured.
OUTSIDE = 3 * 2**28
CHARACTERS_A_TOKEN = 4  # characters per token of an English prompt


class Cost(NamedTuple):
    """The cost of a training step; all but `launches` in bytes."""

    weights: int  # parameters and buffers
    held: int  # all that is alive between forward and backward
    peak: int
    launches: int  # number of kernels launched


def count(
    model_class: type,
    cfg: Any,
    device: torch.device,
    batch_size: int,
    max_tokens: int | None = None,
) -> Cost:
    """Return the Cost of a step of a `model` section: `batch_size` texts of full length after the longest prompt.

    `max_tokens`: the most tokens that the LLM computes at once, as in `BaseModel.split`. For a GPU the fused attention
    of GPUs of 2020 and later is counted. Raises ValueError for quantised weights that cannot train.
    """
    kind = quantization.kind_of(cfg.llm_quantization, cfg.low_resource)
    if refusal := quantization.refusal_to_train(kind, device):
        raise ValueError(refusal)
    model = model_class.skeleton(cfg, resolve_compute_dtype(cfg.llm_precision, device)).train()
    model.llama_tokenizer = tokenizer_of_characters()
    if cfg.prompt_path:
        longest = max(read_prompts(cfg.prompt_path, cfg.prompt_template), key=len)
        before, after = (len(piece) // CHARACTERS_A_TOKEN for piece in longest.split(IMAGE_SLOT))
        model.prompt_list = ["a" * before + IMAGE_SLOT + "a" * after]
    samples = {"text_input": ["a" * cfg.max_txt_len] * batch_size}
    if max_tokens is not None:
        samples, _ = model.split(samples, max_tokens)[0]
    return count_step(model, samples, device, lambda batch: model(batch)["loss"])


def count_step(model: torch.nn.Module, samples: dict, device: torch.device, loss: Callable) -> Cost:
    """Return the Cost of ``loss(samples)``, backward and AdamW.

    `model` is on the meta device. The images of `samples` are added here.
    """
    shape = (len(samples["text_input"]), 3, model.image_size, model.image_size)
    with (
        without_values(model),
        as_on_gpu(device.type == "cuda"),
        MemoryCounter() as counter,
    ):
        counter.hold([*model.parameters(), *model.buffers()])
        weights = counter.now
        optimizer = _with_state(
            [parameter for parameter in model.parameters() if parameter.requires_grad]
        )
        samples = samples | {"image": torch.empty(shape), "iters": 0}
        counter.launches = 0
        value = loss(samples)
        held = counter.now
        value.backward()
        optimizer.step()
    return Cost(weights, held, counter.peak, counter.launches)


def _with_state(parameters):
    """Return an AdamW whose moments are allocated, as from the second step on."""
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def tokenizer_of_characters() -> Any:
    """Return a tokenizer with one token for each printable ASCII character and the newline."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    symbols = ["<s>", "</s>", "\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.pad_token, fast.padding_side = fast.eos_token, "right"
    return fast


class MemoryCounter(TorchDispatchMode):
    """Tracks all tensors that are created in its block: bytes alive `now` and at the `peak`, and kernel `launches`.

    An operation counts as a kernel if it writes memory; views and bare allocations do not.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.launches = 0
        self._alive = {}  # {address of a storage: weak reference that removes this entry}

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that existed before the block."""
        for tensor in tensors:
            self._hold(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_new = [self._hold(leaf) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        fills_new_memory = any(is_new) and "empty" not in func._schema.name
        self.launches += func._schema.is_mutable or fills_new_memory
        return out

    def _hold(self, tensor):
        """Count the storage of a tensor, unless it is counted already; return whether it was new."""
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
def without_values(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Within the block all tensors have no values (FakeTensor), those of `model`, on the meta device, included.

    Their device is the CPU: with a GPU's, backward would call its driver, which may not be installed.
    """
    fakes = {}  # by identity, so that tied weights stay tied

    def fake(tensor):
        if id(tensor) not in fakes:
            made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, torch.nn.Parameter):
                made = torch.nn.Parameter(made, tensor.requires_grad)
            fakes[id(tensor)] = made
        return fakes[id(tensor)]

    with FakeTensorMode():
        for part in model.modules():
            for tensors in (part._parameters, part._buffers):
                tensors.update(
                    {name: fake(tensor) for name, tensor in tensors.items() if tensor is not None}
                )
        yield model
