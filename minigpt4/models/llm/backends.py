"""The backends with which training can run the LLM, fastest first, and the choice of one for a given LLM.

compiled  as lean, with the operations between matrix products compiled; only with `model.compile`
lean      packed rows; LLaMA's layers, also with biases or norms of heads, computed by our own code (`lean.py`)
packed    packed rows through the model of transformers
padded    rows padded to the longest, as in 2023, which works with every model
"""

import logging
from collections.abc import Callable

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from minigpt4.models.llm import adapters, attention, lean, packing
from minigpt4.models.llm.language_model import trains

PACKED = {
    "compiled": lean.compiled_label_logits,
    "lean": lean.label_logits,
    "packed": packing.label_logits,
}
_LOG_SUFFIX = {
    "compiled": ", layers are lean and compiled",
    "lean": ", layers are lean",
    "packed": "",
}
# The largest accepted relative error of a backend's logits against the model's own. Numerical noise on a trained LLM is
# 5.8e-7 in float32 and 1.5e-2 in bfloat16; attending to another row's text changes logits by 0.14.
TOLERANCE = {torch.float32: 1e-4}
HALF_TOLERANCE = 5e-2
_PROBE_LENGTHS, _NUM_SHARED = (5, 3), 2  # of the two rows tried, and of their common beginning


def choose(llm: nn.Module, may_pack: bool = True, may_compile: bool = False) -> str:
    """Return the first backend that reproduces the LLM's own logits on a few tokens; the log names it.

    Call under the autocast of training. An LLM without values (meta, FakeTensor) is judged by its structure alone.
    """
    reasons = [] if may_pack else ["model.pack_sequences is False"]
    for backend in PACKED if may_pack else ():
        if backend == "compiled" and not may_compile:
            continue
        reason = _obstacle(llm, backend)
        if reason is None:
            logging.info("LLM: texts are packed%s", _LOG_SUFFIX[backend])
            return backend
        reasons.append(f"{backend}: {reason}")
    logging.info("LLM: texts are padded to the longest (%s)", "; ".join(reasons))
    return "padded"


def can_record(backend: str, images: torch.Tensor) -> bool:
    """Whether a pass can be recorded: it must depend only on what `row_logits.packed` tells the recorder.

    `images` are vectors [I, Q, D]. The layers of transformers may depend on more; so does attention without the fused
    kernel, as its indices come from the host.
    """
    is_fused = not images.is_cuda or attention.has_flash(images.device, images.dtype)
    return backend in ("lean", "compiled") and is_fused


def _obstacle(llm: nn.Module, backend: str) -> str | None:
    """Return why the LLM cannot be run by a backend, None if it can."""
    # lean layers give no gradient to their weights
    if backend != "packed" and trains(llm):
        return "weights of the LLM train"
    if backend != "packed" and not lean.fits(llm):
        return "other layers than LLaMA's"
    # tensors without values have no logits to compare
    weight = llm.get_input_embeddings().weight
    if weight.is_meta or isinstance(weight, FakeTensor):
        return "nothing runs" if backend == "compiled" else None
    try:
        with adapters.without_dropout(llm):
            error = _relative_error(llm, PACKED[backend])
    except Exception as refusal:  # a model of any library may raise anything
        first_line = next(iter(str(refusal).splitlines()), "")
        return f"{type(refusal).__name__}: {first_line}"
    # under autocast float32 weights, too, compute in half precision
    is_half = torch.is_autocast_enabled(weight.device.type)
    limit = HALF_TOLERANCE if is_half else TOLERANCE.get(llm.dtype, HALF_TOLERANCE)
    if error <= limit:
        return None
    return f"logits differ from the model's own by {error:.1e}, more than {limit:g}"


@torch.no_grad()
def _relative_error(llm: nn.Module, label_logits: Callable) -> float:
    """Return the relative error of the logits of packed rows, against those of each row run alone."""
    embedding = llm.get_input_embeddings()
    device, total = embedding.weight.device, _NUM_SHARED + sum(_PROBE_LENGTHS)
    ids = torch.arange(1, total + 1, device=device) * 97 % embedding.weight.shape[0]
    embeds = embedding(ids)  # [total, D]
    # packed: the common beginning, then the own positions of each row
    positions = torch.arange(_NUM_SHARED, device=device)
    for length in _PROBE_LENGTHS:
        own = torch.arange(_NUM_SHARED, _NUM_SHARED + length, device=device)
        positions = torch.cat([positions, own])
    segments = attention.Segments(_PROBE_LENGTHS, device, _NUM_SHARED)
    predicting = torch.arange(_NUM_SHARED, total, device=device)
    packed = label_logits(llm, embeds, positions, segments, predicting).float()
    # alone: each row after the common beginning
    shared, *rows = embeds.split((_NUM_SHARED, *_PROBE_LENGTHS))
    alone = [
        llm(inputs_embeds=torch.cat([shared, row])[None], use_cache=False).logits[0] for row in rows
    ]
    expected = torch.cat([logits[_NUM_SHARED:] for logits in alone]).float()
    return ((packed - expected).norm() / expected.norm()).item()
