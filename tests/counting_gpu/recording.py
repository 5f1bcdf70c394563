"""How functions are recorded, and what a failure leaves: python -m tests.counting_gpu.recording."""

import json
import logging

import torch

from minigpt4.common.cuda_graphs import GIB, Recorder, record
from tests.counting_gpu.counts import counts, reset

DEVICE, SIZE = torch.device("cuda"), 64


def square(size=SIZE, dtype=torch.float16):
    return torch.ones(size, size, dtype=dtype, device=DEVICE)


def product(weight):
    """Return a function of a matrix that has a gradient: a product and an elementwise kernel."""
    return lambda x: (x @ weight).sin()


def stream():
    return torch.cuda.current_stream().cuda_stream


class Warnings(logging.Handler):
    """The warnings inside the block."""

    def __enter__(self):
        self.messages = []
        logging.getLogger().addHandler(self)
        return self.messages

    def emit(self, record):
        self.messages.append(record.getMessage())

    def __exit__(self, *error):
        logging.getLogger().removeHandler(self)


def one_of_each():
    """Return what is captured of a forward and a backward pass, which autograd runs in a thread of its own."""
    recorder, x = Recorder(is_checked=False), square().requires_grad_()
    reset()
    for _ in range(3):
        recorder("product", product(square()), x).sum().backward()
    found = counts()
    return {"nodes": found.nodes, "beside": found.beside, "calls": recorder.calls}


def fails(function):
    """Return what a function that cannot be recorded leaves."""
    recorder, before, x = Recorder(is_checked=False), stream(), square().requires_grad_()
    with Warnings() as warnings:
        results = [recorder("fails", function, x) for _ in range(3)]
    results[-1].sum().backward()
    torch.ones(GIB, dtype=torch.uint8, device=DEVICE)  # freed at once, but kept in torch's cache
    torch.cuda.empty_cache()
    return {
        "warnings": warnings,
        "off": recorder.is_off,
        "same stream": stream() == before,
        "captures": torch.cuda.is_current_stream_capturing(),
        "gradient": x.grad is not None,
        "cache is emptied": torch.cuda.memory_reserved() < GIB,
    }


def read(x):
    """Read a value, which no capture allows."""
    return x * x.sum().item()


class Fussy(Exception):
    """Not a kind that torch raises; it has no message."""


def unusual(x):
    if torch.cuda.is_current_stream_capturing():
        raise Fussy
    return x.sin()


class CastOf(torch.autograd.Function):
    """Notes autocast's state in backward."""

    seen = []

    @staticmethod
    def forward(ctx, x):
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        CastOf.seen.append(torch.is_autocast_enabled("cuda"))
        return grad.clone()


def autocast_in_backward():
    """Return whether autocast was on in any backward pass of a training that runs forward under it."""
    recorder, x = Recorder(is_checked=False), square().requires_grad_()
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            loss = recorder("cast", CastOf.apply, x).sum()
        loss.backward()
    return {"calls": len(CastOf.seen), "on": any(CastOf.seen), "recorded": recorder.calls}


def memory_of_recordings():
    """Return the bytes that are allocated after the first and after the last of some recordings of one size."""
    recorder, weight, found = Recorder(is_checked=False), square(), []
    for number in range(12):
        x = square().requires_grad_()
        for _ in range(2):
            recorder(number, product(weight), x).sum().backward()
        found.append(torch.cuda.memory_allocated())
    return [found[1], found[-1]]


def growing():
    """Return how recordings of ever larger shapes end on a GPU that they would fill."""
    recorder, weight = Recorder(is_checked=False), square(2**14)
    torch.cuda.reset_peak_memory_stats()
    with Warnings() as warnings:
        for rows in range(2**14, 2**16, 2**10):
            x = torch.ones(rows, 2**14, dtype=torch.float16, device=DEVICE, requires_grad=True)
            for _ in range(2):
                recorder("growing", lambda x: (x @ weight).sin() @ weight, x).sum().backward()
    held = torch.cuda.memory_reserved() / GIB
    return {"warnings": warnings, "calls": recorder.calls, "GiB held": held}


def after_loading():
    """Return how many calls are recorded after most of the GPU was full for a while, as when weights are packed."""
    recorder, x = Recorder(is_checked=False), square().requires_grad_()
    torch.empty(60 * GIB, dtype=torch.uint8, device=DEVICE)
    for _ in range(3):
        recorder("sines", lambda x: x.sin(), x).sum().backward()
    return recorder.calls


def on_another_gpu():
    """Return what is captured of a function on a GPU that is not the current one."""
    device = torch.device("cuda", 1)
    x = torch.ones(SIZE, device=device)
    reset()
    record(device, lambda: x.sin().cos(), warm_ups=1)
    found = counts()
    return {"nodes": found.nodes, "beside": found.beside, "current": torch.cuda.current_device()}


def backward_twice():
    """Return what a second backward() of one forward pass says."""
    recorder, x = Recorder(is_checked=False), square().requires_grad_()
    for _ in range(2):
        loss = recorder("product", product(square()), x).sum()
    loss.backward(retain_graph=True)
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return ""


def main():
    """Print what was found."""
    found = {
        "forward and backward": one_of_each(),
        "an illegal call": fails(read),
        "an exception": fails(unusual),
        "afterwards": one_of_each(),
        "autocast": autocast_in_backward(),
        "memory": memory_of_recordings(),
        "backward twice": backward_twice(),
        "another GPU": on_another_gpu(),
        "growing": growing(),
        "after loading": after_loading(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
