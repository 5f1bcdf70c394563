"""One part of a training step alone: the ViT or the Q-Former forward, the LLM forward and backward to the images.

Ours, what 2023 computes and what transformers gives take turns in one process, with the same random weights. No speed
is shown unless our result is as near to that of 2023 in float32 as `parity` wants it.
"""

from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks import baseline_2023, blip2, parity, train, workload
from benchmarks.harness import DEVICE, DTYPE, ROUNDS, NotEqual, row, take_turns, timed
from minigpt4.common.device import resolve_device
from minigpt4.models.base_model import DTYPES

Ways = dict[str, Callable[[], Tensor]]
SIZES = [size for size in workload.SIZES if size not in ("7b", "13b")]  # float32 copies have to fit


class Part:
    """A command; `ways` takes (model, batch) and returns {way: function that returns a tensor}.

    `flops`: those that are needed at least, where they are not those that ours executes.
    """

    OPTIONS = {
        "--size": {"choices": SIZES, "default": "toy", "help": "7b-thin: full width, few layers"},
        "--stage": {"type": int, "choices": (1, 2), "default": 1, "help": "whose texts (default: %(default)s)"},
        "--batch": {"type": int, "default": 8},
        "--device": DEVICE,
        "--dtype": DTYPE,
        "--rounds": ROUNDS,
    }

    def __init__(self, title: str, ways: Callable[..., Ways], flops: Callable[..., float] | None = None):
        self.HELP, self.title = f"{title}, beside that of 2023 and of transformers", title
        self.ways, self.flops = ways, flops

    def run(self, args: Namespace) -> dict:
        """Return the rows and errors of all ways. Raises NotEqual where ours is too far from 2023."""
        device = resolve_device(args.device)
        half_name = "fp16" if device.type == "cuda" else "bf16"
        dtype = args.dtype or half_name
        half = workload.random_model(args.size, DTYPES[half_name if dtype == "fp32" else dtype], device, args.stage)
        wide, batch = workload.in_float32(half), workload.batches(half, args.stage, args.batch, 1)[0]
        wide_ways, half_ways = self.ways(wide, batch), self.ways(half, batch)
        # errors against 2023 in float32, before any speed
        exact, errors = wide_ways["2023"](), {}
        for way in wide_ways:
            errors[way] = {"fp32": distance(wide_ways[way](), exact), "half": distance(half_ways[way](), exact)}
            print(f"{way:<16} error in fp32 {errors[way]['fp32']:.1e}, in half precision {errors[way]['half']:.2e}")
        limit = parity.HALF_LIMIT * errors["2023"]["half"]
        if errors["ours"]["fp32"] > parity.FLOAT32_LIMIT or errors["ours"]["half"] > limit:
            raise NotEqual("the errors are too large")
        model, ways = (wide, wide_ways) if dtype == "fp32" else (half, half_ways)
        seconds = take_turns({way: timed(each, device) for way, each in ways.items()}, args.rounds, warm_up=1)
        flops = self.flops(model, batch) if self.flops else workload.count_flops(ways["ours"])
        best = flops / train.matmul_flops(device, dtype)
        name = f"{self.title}, {args.size} {dtype}, batch {args.batch}, stage {args.stage}"
        rows = [row(name, "s", seconds["ours"], seconds["2023"], seconds.get("transformers"), limit=best)]
        return {"rows": rows, "errors": errors, "seed": workload.SEED}


def vit_ways(model: nn.Module, batch: dict) -> Ways:
    """Return ways to what the Q-Former is given for the images."""
    stock = blip2.blip2(model).vision_model
    return {
        "2023": partial(_forward, model, lambda: see(model, batch), as_2023=True),
        "transformers": partial(_forward, model, lambda: stock(pixel_values=batch["image"]).last_hidden_state),
        "ours": partial(_forward, model, lambda: see(model, batch)),
    }


def see(model: nn.Module, batch: dict) -> Tensor:
    """Return what the Q-Former is given for the images."""
    return model.ln_vision(model.visual_encoder(batch["image"]))


def qformer_ways(model: nn.Module, batch: dict) -> Ways:
    """Return two ways: the Q-Former is made of transformers' layers, so theirs is ours."""
    seen = _forward(model, lambda: see(model, batch))
    query = partial(model.Qformer, model.query_tokens, seen)
    return {"2023": partial(_forward, model, query, as_2023=True), "ours": partial(_forward, model, query)}


@torch.no_grad()
def _forward(model, function, as_2023=False):
    with model.maybe_autocast(), baseline_2023.plain_vision(model) if as_2023 else nullcontext():
        return function()


def llm_ways(model: nn.Module, batch: dict) -> Ways:
    """Return ways to the gradient of the loss with respect to what the LLM is given for the images."""
    with torch.no_grad():
        embeds = workload.image_embeds(model, batch["image"]).requires_grad_()

    def gradient(loss):
        embeds.grad = None
        with workload.given_images(model, embeds):
            (1024 * loss()).backward()  # as a GradScaler, see parity
        return embeds.grad / 1024

    def stock():
        inputs = workload.llm_inputs(model, batch)
        with blip2.stock_attention(model.llama_model), model.maybe_autocast():
            return model.llama_model(**inputs, use_cache=False).loss

    losses = {"2023": partial(baseline_2023.loss, model, batch), "transformers": stock}
    losses["ours"] = lambda: model(batch)["loss"]
    return {way: partial(gradient, loss) for way, loss in losses.items()}


def llm_flops(model: nn.Module, batch: dict) -> float:
    """Return the FLOPs that the LLM cannot do without, forward and back to the images."""
    with torch.no_grad():
        vision = workload.count_flops(lambda: workload.image_embeds(model, batch["image"]))
    projection = 2 * len(batch["image"]) * model.query_tokens.shape[1] * model.llama_proj.weight.numel()
    return workload.useful_flops(model, batch) - vision - projection


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the relative distance of two tensors, in float32."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


VIT = Part("the ViT's forward pass", vit_ways)
QFORMER = Part("the Q-Former's forward pass", qformer_ways)
LLM = Part("the LLM forward and backward", llm_ways, llm_flops)
