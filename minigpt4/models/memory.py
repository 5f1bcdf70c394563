"""The memory of a training step, counted with tensors that have shapes and no values: no weights, no GPU.

Counted is what torch.cuda.max_memory_allocated would report: every storage that is alive at once, rounded up as CUDA's
caching allocator rounds. What it does not know is in OUTSIDE.
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
# Bytes that a card must have beyond those counted: CUDA's context and kernels, workspaces of cuBLAS, gaps between
# tensors. An assumption, not measured.
OUTSIDE = 3 * 2**28
CHARACTERS_A_TOKEN = 4  # of an English prompt


class Cost(NamedTuple):
    """What a step takes: bytes of weights, held between forward and backward, and at most; kernels started."""

    weights: int
    held: int
    peak: int
    launches: int


def count(
    model_class: type,
    cfg: Any,
    device: torch.device,
    batch_size: int,
    max_tokens: int | None = None,
) -> Cost:
    """Return the Cost of a step of a `model` section: `batch_size` texts of full length behind the longest prompt.

    `max_tokens`: as many are in the LLM at once. On a GPU the attention of GPUs of 2020 and later is counted. Raises
    ValueError for weights that cannot train.
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
    """Return the Cost of ``loss(samples)``, backward and AdamW; the model is on the meta device, images are added."""
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
        found = loss(samples)
        held = counter.now
        found.backward()
        optimizer.step()
    return Cost(weights, held, counter.peak, counter.launches)


def _with_state(parameters):
    """Return an AdamW that has its moments, as from the second step on."""
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def tokenizer_of_characters() -> Any:
    """Return a tokenizer with a token for each printable ASCII character and the end of a line."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    symbols = ["<s>", "</s>", "\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    tokenizer.decoder = decoders.Fuse()
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    found.pad_token, found.padding_side = found.eos_token, "right"
    return found


class MemoryCounter(TorchDispatchMode):
    """Follows all tensors that come into being in its block; `now` and `peak` in bytes, `launches`: kernels started.

    A kernel is an operation that fills memory: views and bare allocations are none.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.launches = 0
        self._alive = {}  # address of a storage -> weak reference that ends its entry

    def hold(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that were there before."""
        for tensor in tensors:
            self._hold(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_new = [self._hold(leaf) for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.launches += func._schema.is_mutable or (
            any(is_new) and "empty" not in func._schema.name
        )
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
def without_values(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Give `model`, on the meta device, tensors without values inside the block, where all tensors are such.

    They say that they lie on the CPU: backward asks a GPU's driver, which may not be there.
    """
    fakes = {}

    def fake(tensor):
        if id(tensor) not in fakes:
            made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            fakes[id(tensor)] = (
                torch.nn.Parameter(made, tensor.requires_grad) if is_parameter else made
            )
        return fakes[id(tensor)]

    with FakeTensorMode():
        for part in model.modules():
            for tensors in (part._parameters, part._buffers):
                tensors.update(
                    {name: fake(tensor) for name, tensor in tensors.items() if tensor is not None}
                )
        yield model
