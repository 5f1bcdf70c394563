"""One part of a training step alone: the ViT or the Q-Former forward, the LLM forward and backward to the images.

Ours, what 2023 computes and what transformers gives take turns in one process, with the same random weights. No speed
is shown unless our result is as near to that of 2023 in float32 as `parity` wants it.
"""

from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks import baseline_2023, blip2, parity, train, workload
from benchmarks.harness import DEVICE, DTYPE, ROUNDS, NotEqual, row, take_turns, timed
from minigpt4.common.device import resolve_device
from minigpt4.models.base_model import DTYPES

Ways = dict[str, Callable[[], Tensor]]
SIZES = [size for size in workload.SIZES if size not in ("7b", "13b")]  # float32 copies have to fit


class Part:
    """A command; `ways` takes (model, batch) and returns {way: function that returns a tensor}."""

    OPTIONS = {
        "--size": {"choices": SIZES, "default": "toy", "help": "7b-thin: full width, few layers"},
        "--stage": {"type": int, "choices": (1, 2), "default": 1, "help": "whose texts (default: %(default)s)"},
        "--batch": {"type": int, "default": 8},
        "--device": DEVICE,
        "--dtype": DTYPE,
        "--rounds": ROUNDS,
    }

    def __init__(self, title: str, ways: Callable[[nn.Module, dict], Ways], flops: Callable[[nn.Module, dict], float]):
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
        best = self.flops(model, batch) / train.matmul_flops(device, dtype)
        name = f"{self.title}, {args.size} {dtype}, batch {args.batch}, stage {args.stage}"
        rows = [row(name, "s", seconds["ours"], seconds["2023"], seconds.get("transformers"), limit=best)]
        return {"rows": rows, "errors": errors, "seed": workload.SEED}


def vit_ways(model: nn.Module, batch: dict) -> Ways:
    """Return ways to what the Q-Former is given for the images."""
    stock = blip2.blip2(model)
    return {
        "2023": _forward(model, lambda: see(model, batch), as_2023=True),
        "transformers": _forward(model, lambda: stock.vision_model(pixel_values=batch["image"]).last_hidden_state),
        "ours": _forward(model, lambda: see(model, batch)),
    }


def see(model: nn.Module, batch: dict) -> Tensor:
    """Return what the Q-Former is given for the images."""
    return model.ln_vision(model.visual_encoder(batch["image"]))


def qformer_ways(model: nn.Module, batch: dict) -> Ways:
    """Return two ways: the Q-Former is made of transformers' layers, so theirs is ours."""
    seen = _forward(model, lambda: see(model, batch))()
    query = lambda: model.Qformer(model.query_tokens, seen)  # noqa: E731
    return {"2023": _forward(model, query, as_2023=True), "ours": _forward(model, query)}


def _forward(model, function, as_2023=False):
    @torch.no_grad()
    def run():
        with model.maybe_autocast():
            if not as_2023:
                return function()
            with baseline_2023.plain_vision(model):
                return function()

    return run


def llm_ways(model: nn.Module, batch: dict) -> Ways:
    """Return ways to the gradient of the loss with respect to what the LLM is given for the images."""
    with torch.no_grad():
        embeds = workload.image_embeds(model, batch["image"])
    embeds.requires_grad_()

    def gradient(loss):
        def run():
            embeds.grad = None
            with workload.given_images(model, embeds):
                (1024 * loss()).backward()  # as a GradScaler, see parity
            return embeds.grad / 1024

        return run

    return {
        "2023": gradient(lambda: baseline_2023.loss(model, batch)),
        "transformers": gradient(lambda: _stock_loss(model, batch)),
        "ours": gradient(lambda: model(batch)["loss"]),
    }


def _stock_loss(model, batch):
    inputs = workload.llm_inputs(model, batch)
    with blip2.stock_attention(model.llama_model), model.maybe_autocast():
        return model.llama_model(**inputs, use_cache=False).loss


def llm_flops(model: nn.Module, batch: dict) -> float:
    """Return the FLOPs that the LLM cannot do without, forward and back to the images."""
    with torch.no_grad():
        vision = workload.count_flops(lambda: workload.image_embeds(model, batch["image"]))
    projection = 2 * len(batch["image"]) * model.query_tokens.shape[1] * model.llama_proj.weight.numel()
    return workload.useful_flops(model, batch) - vision - projection


def distance(found: Tensor, expected: Tensor) -> float:
    """Return the relative distance of two tensors, in float32."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def _counted(ways):
    return lambda *args: workload.count_flops(ways(*args)["ours"])


VIT = Part("the ViT's forward pass", vit_ways, _counted(vit_ways))
QFORMER = Part("the Q-Former's forward pass", qformer_ways, _counted(qformer_ways))
LLM = Part("the LLM forward and backward", llm_ways, llm_flops)
