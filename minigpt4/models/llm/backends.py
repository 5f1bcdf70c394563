"""The ways in which training can run the LLM, fastest first, and which of them an LLM can take.

compiled  as lean, with what lies between matrix products compiled, for who asks for it (`model.compile`)
lean      packed texts, LLaMA's layers, or those with biases and norms of heads, computed here (`lean.py`)
packed    packed texts through the model of transformers
padded    texts padded to the longest, as 2023, which every model can take
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
_SAID = {"compiled": ", layers are lean and compiled", "lean": ", layers are lean", "packed": ""}
# How far a backend's logits may lie from the model's own, relative. Noise on a trained LLM: 5.8e-7
# in float32, 1.5e-2 in bfloat16; another row's text shining through changes them by 0.14.
TOLERANCE = {torch.float32: 1e-4}
HALF_TOLERANCE = 5e-2
_ROWS, _NUM_SHARED = (5, 3), 2  # lengths of the texts tried, and of their common beginning


def choose(llm: nn.Module, may_pack: bool = True, may_compile: bool = False) -> str:
    """Return the first backend that gives the LLM's own logits on a few tokens; the log names it.

    Call under the autocast of training. An LLM without weights (meta, FakeTensor) is judged by its
    structure.
    """
    reasons = [] if may_pack else ["model.pack_sequences is False"]
    for backend in PACKED if may_pack else ():
        if backend == "compiled" and not may_compile:
            continue
        reason = _obstacle(llm, backend)
        if reason is None:
            logging.info("LLM: texts are packed%s", _SAID[backend])
            return backend
        reasons.append(f"{backend}: {reason}")
    logging.info("LLM: texts are padded to the longest (%s)", "; ".join(reasons))
    return "padded"


def can_record(backend: str, images: torch.Tensor) -> bool:
    """Whether a pass depends on nothing but what `row_logits.packed` tells a recorder; `images`: vectors [I, Q, D].

    Layers of transformers may depend on more, and so does attention without the fused kernel, whose indices come
    from the host.
    """
    is_fused = not images.is_cuda or attention.has_flash(images.device, images.dtype)
    return backend in ("lean", "compiled") and is_fused


def _obstacle(llm: nn.Module, backend: str) -> str | None:
    """Return why the LLM cannot take a backend, None if it can."""
    # layers computed here give no gradient to their weights
    if backend != "packed" and trains(llm):
        return "weights of the LLM train"
    if backend != "packed" and not lean.fits(llm):
        return "other layers than LLaMA's"
    # without values there is nothing to compare
    weight = llm.get_input_embeddings().weight
    if weight.is_meta or isinstance(weight, FakeTensor):
        return "nothing runs" if backend == "compiled" else None
    try:
        with adapters.without_dropout(llm):
            error = _error(llm, PACKED[backend])
    except Exception as refusal:  # whatever a foreign model raises, it cannot take this backend
        return f"{type(refusal).__name__}: {str(refusal).splitlines()[0] if str(refusal) else ''}"
    # weights that train are in float32, and autocast computes with fewer bits
    is_half = torch.is_autocast_enabled(weight.device.type)
    limit = HALF_TOLERANCE if is_half else TOLERANCE.get(llm.dtype, HALF_TOLERANCE)
    return (
        None
        if error <= limit
        else f"logits differ from the model's own by {error:.1e}, more than {limit:g}"
    )


@torch.no_grad()
def _error(llm: nn.Module, label_logits: Callable) -> float:
    """Return the relative distance of the logits of packed texts from those of each text alone."""
    embedding = llm.get_input_embeddings()
    device, total = embedding.weight.device, _NUM_SHARED + sum(_ROWS)
    # [total, D]
    embeds = embedding(torch.arange(1, total + 1, device=device) * 97 % embedding.weight.shape[0])
    # packed: what is shared, then each text's own positions
    positions = torch.arange(_NUM_SHARED, device=device)
    for length in _ROWS:
        own = torch.arange(_NUM_SHARED, _NUM_SHARED + length, device=device)
        positions = torch.cat([positions, own])
    segments = attention.Segments(_ROWS, device, _NUM_SHARED)
    predicting = torch.arange(_NUM_SHARED, total, device=device)
    packed = label_logits(llm, embeds, positions, segments, predicting).float()
    # alone: each text behind what is shared
    shared, *rows = embeds.split((_NUM_SHARED, *_ROWS))
    alone = [
        llm(inputs_embeds=torch.cat([shared, row])[None], use_cache=False).logits[0] for row in rows
    ]
    expected = torch.cat([logits[_NUM_SHARED:] for logits in alone]).float()
    return ((packed - expected).norm() / expected.norm()).item()
