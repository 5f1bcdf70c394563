"""Functions recorded as CUDA graphs: a step then costs the host a few launches instead of thousands."""

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from minigpt4.common.device import shared_generators

MOST = 64  # recordings; a shape that comes later runs as it is
# how far a replay may lie from the function itself, relative: float16 rounds to 5e-4, attention's backward adds up in any
# order; another row's text shining through changes logits by 0.14 (models.llm.backends)
TOLERANCE = 1e-2
GIB = 2**30


class Recorder:
    """Calls functions, each recorded when it is called with tensors of the same shapes for the second time.

    A function takes tensors and gives one; a gradient goes to the first of them alone. What else it reads (weights,
    numbers) must stay where and what it is. The recordings share the memory of what they compute in between, so a
    gradient has to be asked for before the next call. Where no graph can be recorded, or one gives other values than
    the function, a warning says so, and the functions run as they are.
    """

    def __init__(self, is_checked: bool = True) -> None:
        """`is_checked`: what is recorded has to give the values of the function itself."""
        self.is_checked, self.is_off = is_checked, False
        self.calls = 0  # of recordings
        self._met: Counter[Hashable] = Counter()
        self._recordings: dict[Hashable, Recording] = {}
        self._pool = None

    def __deepcopy__(self, memo: dict) -> "Recorder":
        return Recorder(self.is_checked)  # a copy's weights lie elsewhere

    def __call__(self, name: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return `function(*inputs)`; `name` holds all that it depends on beside the shapes of its inputs."""
        if self.is_off or not inputs[0].is_cuda:
            return function(*inputs)
        has_gradient = torch.is_grad_enabled() and inputs[0].requires_grad
        key = (name, has_gradient, *((each.shape, each.dtype) for each in inputs))
        self._met[key] += 1
        if key not in self._recordings and self._met[key] > 1 and len(self._recordings) < MOST:
            self._record(key, function, inputs, has_gradient)
        if (recording := self._recordings.get(key)) is None:
            return called(function, inputs)
        self.calls += 1
        return Replay.apply(self, recording, *inputs)

    def _record(self, key, function, inputs, has_gradient):
        try:
            self._check_room()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            recording = Recording(function, inputs, has_gradient, self._pool)
            if self.is_checked:
                recording.check()
            if not self._recordings:
                logging.info("model.cuda_graphs: steps are recorded")
            self._recordings[key] = recording
        except (RuntimeError, MemoryError) as error:
            self.is_off = True
            self._recordings.clear()
            torch.cuda.empty_cache()
            reason = str(error).strip().splitlines()[0]
            logging.warning("model.cuda_graphs: steps are not recorded: %s", reason)

    def _check_room(self):
        """Raise MemoryError unless the GPU holds a step twice: as recorded, and as a shape that is new needs it."""
        if self._recordings:
            return
        torch.cuda.empty_cache()
        step = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        free = torch.cuda.mem_get_info()[0]
        if free < 2 * step:
            raise MemoryError(
                f"a step takes {step / GIB:.1f} GiB beside the weights, which a GPU must have twice; "
                f"{free / GIB:.1f} GiB are free"
            )


class Recording:
    """A function's graph, and that of its gradient with respect to the first input."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        has_gradient: bool,
        pool: Any,
    ) -> None:
        self.inputs = [each.detach().clone() for each in inputs]
        self.inputs[0].requires_grad_(has_gradient)
        self.function, self.has_gradient = function, has_gradient
        # kernels are compiled, chosen, and workspaces made at first calls, which cannot be recorded
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._directly()
            self.expected = self._directly()
        torch.cuda.current_stream().wait_stream(side)
        # other threads, such as the loader's, may use the GPU meanwhile, but for torch's own generator
        options = {"pool": pool, "capture_error_mode": "thread_local"}
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with shared_generators:
            with torch.cuda.graph(self.forward, **options):
                output = called(self.function, self.inputs)
            if has_gradient:
                self.grad = torch.ones_like(output)
                with torch.cuda.graph(self.backward, **options):
                    self.grad_input = torch.autograd.grad(output, self.inputs[0], self.grad)[0]
        self.output = output.detach()

    def _directly(self):
        """Return the function's output, and the gradient of its sum where there is one, without a graph."""
        output = called(self.function, self.inputs)
        if not self.has_gradient:
            return [output]
        grad = torch.autograd.grad(output, self.inputs[0], torch.ones_like(output))[0]
        return [output.detach(), grad]

    def check(self) -> None:
        """Raise RuntimeError if a replay gives other values than the function gave."""
        found = [self.output]
        self.forward.replay()
        if self.has_gradient:
            self.backward.replay()
            found.append(self.grad_input)
        for mine, theirs in zip(found, self.expected, strict=True):
            error, size = (mine.float() - theirs.float()).norm(), theirs.float().norm()
            if not error <= TOLERANCE * size:
                raise RuntimeError(
                    f"a recorded step differs from the step itself by {error / size:.1e}"
                )
        del self.expected


def called(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """Return `function(*inputs)` without weights in another type that autocast kept from a call before.

    They would not be in a graph; and as compiled kernels ask how autocast is set, a function is always called so.
    """
    kind = inputs[0].device.type
    is_on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    with torch.autocast(kind, dtype, enabled=is_on, cache_enabled=False):
        return function(*inputs)


class Replay(torch.autograd.Function):
    """A call of a Recording."""

    @staticmethod
    def forward(ctx: Any, recorder: Recorder, recording: Recording, *inputs: Tensor) -> Tensor:
        ctx.recorder, ctx.recording = recorder, recording
        ctx.call = recorder.calls
        with torch.no_grad():
            for mine, theirs in zip(recording.inputs, inputs, strict=True):
                mine.copy_(theirs, non_blocking=True)
        recording.forward.replay()
        return recording.output.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        recording = ctx.recording
        if ctx.recorder.calls != ctx.call:
            raise RuntimeError(
                "model.cuda_graphs: backward() came after another forward pass, which has overwritten what it needs; "
                "call backward() after each forward pass, or set model.cuda_graphs=False"
            )
        recording.grad.copy_(grad)
        recording.backward.replay()
        others = [None] * (len(recording.inputs) - 1)
        return None, None, recording.grad_input.clone(), *others
