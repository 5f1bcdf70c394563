"""CUDA graphs: a recorded function costs the host one launch instead of one per kernel."""

import functools
import logging
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from minigpt4.common.device import shared_generators
from minigpt4.common.utils import first_line

MOST = 64  # recordings; further shapes run without one
# Relative difference allowed between a replay and the function itself: float16 rounds to 5e-4, and attention's backward
# adds up in no fixed order; a row that sees another row's text changes logits by 0.14 (models.llm.backends).
TOLERANCE = 1e-2
GIB = 2**30

_one_at_a_time = threading.Lock()  # threads that record share the stream below


def record(
    device: torch.device, *functions: Callable[[], Any], warm_ups: int, pool: Any = None
) -> list[torch.cuda.CUDAGraph]:
    """Return the CUDA graph of each function on `device`; the graphs are to be replayed in this order.

    A function keeps what it computes (say, in an attribute): replays write there. All of them run `warm_ups` times
    first, because kernels are compiled and chosen, and workspaces allocated, at first calls, which cannot be captured.
    `pool`: a graph_pool_handle, for graphs that share memory. After an error the current stream is the caller's again.
    """
    graphs = [torch.cuda.CUDAGraph() for _ in functions]
    pool = pool or torch.cuda.graph_pool_handle()
    with torch.cuda.device(device), _one_at_a_time:
        caller, stream = torch.cuda.current_stream(), _capture_stream(torch.cuda.current_device())
        # when a capture fails, torch.cuda.graph does not bring back the caller's stream; this context does
        with torch.cuda.stream(stream):
            stream.wait_stream(caller)
            for _ in range(warm_ups):
                for function in functions:
                    function()
            caller.wait_stream(stream)
            # other threads (a data loader, other chats) may use the GPU meanwhile, but not torch's own generator
            options = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
            with shared_generators:
                for graph, function in zip(graphs, functions, strict=True):
                    with _pool_left_on_error(pool), torch.cuda.graph(graph, **options):
                        function()
    return graphs


@contextmanager
def _pool_left_on_error(pool: tuple[int, int]) -> Iterator[None]:
    """Within the block, an error of a capture also ends the allocations to `pool`.

    torch 2.11 goes on with them after a capture that CUDA itself has ended, and then never frees cached memory.
    """
    try:
        yield
    except Exception:
        device = torch.cuda.current_device()
        with suppress(RuntimeError):  # raised where they have ended already
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        raise


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """Return the one stream for warm-ups and captures of a device: for each that it sees, cuBLAS keeps a workspace."""
    return torch.cuda.Stream(device)


class Recorder:
    """Calls functions; from the second call with tensors of the same shapes on, a recording is replayed instead.

    A function takes tensors and returns one; only the first input gets a gradient. Whatever else it reads (weights,
    numbers) must stay at the same address and unchanged. Recordings share the memory of their intermediate results, so
    backward() must come before the next call. If recording fails, or a replay differs from the function, a warning
    says so, and from then on functions run without recordings.
    """

    def __init__(self, is_checked: bool = True) -> None:
        """`is_checked`: a recording is used only if it gives the function's own values."""
        self.is_checked, self.is_off = is_checked, False
        self.calls = 0  # of recordings
        self._first_inputs: dict[Hashable, list[Tensor]] = {}  # of shapes seen once; see _new
        self._recordings: dict[Hashable, Recording] = {}
        self._pool = None

    def __deepcopy__(self, memo: dict) -> "Recorder":
        return Recorder(self.is_checked)  # the copied model's weights have other addresses

    def __call__(self, name: Hashable, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Return `function(*inputs)`; `name` holds all that it depends on apart from its inputs' shapes and values."""
        if self.is_off or not _can_record(inputs[0]):
            return function(*inputs)
        if not self._first_inputs and not self._recordings:
            self._begin_step(inputs[0].device)
        has_gradient = torch.is_grad_enabled() and inputs[0].requires_grad
        key = (name, has_gradient, *((each.shape, each.dtype) for each in inputs))
        if key not in self._recordings and len(self._recordings) < MOST:
            if key in self._first_inputs:
                self._record(key, function, inputs, has_gradient)
            else:
                self._first_inputs[key] = [each.detach().clone() for each in inputs[1:]]
        if key not in self._recordings:
            return called(function, inputs)
        self.calls += 1
        return Replay.apply(self, self._recordings[key], *inputs)

    def _record(self, key, function, inputs, has_gradient):
        """Add a recording. If anything fails, give up recording altogether."""
        try:
            self._recordings[key] = self._new(key, function, inputs, has_gradient)
            self._check_room(inputs[0].device)
        # of any kind: the function's own error comes again when it runs without a recording
        except Exception as error:
            reason = first_line(error)
        else:
            if len(self._recordings) == 1:
                logging.info("model.cuda_graphs: steps are recorded")
            return
        # here, where no traceback holds the memory of what has failed
        self.is_off = True
        self.calls += 1  # backward() of an earlier forward pass is refused: a check has replayed over what it needs
        self._recordings.clear()
        self._first_inputs.clear()
        torch.cuda.empty_cache()
        logging.warning("model.cuda_graphs: steps are not recorded: %s", reason)

    def _new(self, key, function, inputs, has_gradient):
        """Return a Recording made with the first call's inputs (all but the first one) and checked on these.

        So the check finds a value that was computed outside the graph and should follow the inputs.
        """
        self._check_room(inputs[0].device)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        earlier = [inputs[0], *self._first_inputs.pop(key)]
        recording = Recording(function, earlier, has_gradient, self._pool)
        if self.is_checked:
            recording.check(function, inputs)
        return recording

    def _begin_step(self, device):
        """Forget the memory that loading took at its peak: from here on the peak is that of steps, for `_check_room`."""
        torch.cuda.reset_peak_memory_stats(device)

    def _check_room(self, device):
        """Raise MemoryError unless the GPU has room for a step of a new shape, and at first for recordings too."""
        torch.cuda.empty_cache()
        step = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0]
        if not self._recordings and free < 2 * step:
            raise MemoryError(
                f"a step takes {step / GIB:.1f} GiB beside the weights, which a GPU must have twice; "
                f"{free / GIB:.1f} GiB are free"
            )
        if free < step:
            raise MemoryError(
                f"a step takes {step / GIB:.1f} GiB beside the weights, and the {len(self._recordings)} recordings "
                f"leave {free / GIB:.1f} GiB free for one of a new shape"
            )


def _can_record(tensor: Tensor) -> bool:
    return tensor.is_cuda


class Recording:
    """The graph of a function, and that of its gradient with respect to the first input."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        has_gradient: bool,
        pool: Any,
    ) -> None:
        # Whatever a graph reads or leaves lies here or in the model, so that later graphs of the pool cannot take its
        # memory: inputs, output, gradients. `function` may hold tensors that it has made at its first call.
        self.function, self.has_gradient = function, has_gradient
        self.inputs, device = [each.detach().clone() for each in inputs], inputs[0].device
        self.inputs[0].requires_grad_(has_gradient)
        self.output = self.grad = self.grad_input = self.backward = None
        if has_gradient:
            both = self._run_forward, self._run_backward
            self.forward, self.backward = record(device, *both, warm_ups=2, pool=pool)
        else:
            (self.forward,) = record(device, self._run_forward, warm_ups=2, pool=pool)
        self.output = self.output.detach()

    def _run_forward(self) -> None:
        self.output = called(self.function, self.inputs)

    def _run_backward(self) -> None:
        if self.grad is None:
            self.grad = torch.ones_like(self.output)
        self.grad_input = input_gradient(self.output, self.inputs[0], self.grad)

    def replay_forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the output for `inputs`, valid until the next replay."""
        with torch.no_grad():
            for mine, theirs in zip(self.inputs, inputs, strict=True):
                mine.copy_(theirs, non_blocking=True)
        self.forward.replay()
        return self.output

    def replay_backward(self, grad: Tensor) -> Tensor:
        """Return the first input's gradient for the output's, valid until the next replay; once for each forward."""
        self.grad.copy_(grad)
        self.backward.replay()
        return self.grad_input

    def check(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        """Raise RuntimeError if replays give other values than `function(*inputs)` and its gradient."""
        first = inputs[0].detach().requires_grad_(self.has_gradient)
        expected = [called(function, [first, *inputs[1:]])]
        found = [self.replay_forward(inputs)]
        if self.has_gradient:
            grad = torch.ones_like(expected[0])
            expected.append(input_gradient(expected[0], first, grad))
            found.append(self.replay_backward(grad))
        for mine, theirs in zip(found, expected, strict=True):
            mine, theirs = mine.detach().float(), theirs.detach().float()
            error, size = (mine - theirs).norm(), theirs.norm()
            if not error <= TOLERANCE * size:  # NaN is an error too
                raise RuntimeError(
                    f"a recorded step differs from the step itself by {error / size:.1e}"
                )


def called(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """Return `function(*inputs)` without the casts of weights that autocast has kept from earlier calls.

    A graph would lack them. Calls that are not recorded are made so too: compiled kernels are compiled anew for each
    state of autocast.
    """
    kind = inputs[0].device.type
    is_on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    with torch.autocast(kind, dtype, enabled=is_on, cache_enabled=False):
        return function(*inputs)


def input_gradient(output: Tensor, first: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient with respect to `first`, without autocast: backward() of a training is called outside it."""
    with torch.autocast(first.device.type, enabled=False):
        return torch.autograd.grad(output, first, grad)[0]


class Replay(torch.autograd.Function):
    """A call of a Recording."""

    @staticmethod
    def forward(ctx: Any, recorder: Recorder, recording: Recording, *inputs: Tensor) -> Tensor:
        ctx.recorder, ctx.recording = recorder, recording
        ctx.call, ctx.is_done = recorder.calls, False
        return recording.replay_forward(inputs).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.recorder.calls != ctx.call:
            raise RuntimeError(
                "model.cuda_graphs: backward() came after another forward pass, which has overwritten what it needs; "
                "call backward() after each forward pass, or set model.cuda_graphs=False"
            )
        if ctx.is_done:
            raise RuntimeError(
                "model.cuda_graphs: backward() came a second time, and the first has overwritten what it needs; "
                "call it once after each forward pass, or set model.cuda_graphs=False"
            )
        ctx.is_done = True
        others = [None] * (len(ctx.recording.inputs) - 1)
        return None, None, ctx.recording.replay_backward(grad).clone(), *others
