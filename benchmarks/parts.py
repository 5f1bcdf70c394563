"""One part of a training step alone: the ViT or the Q-Former forward, the LLM forward and backward to the images.

Ours, what 2023 computes and what transformers gives take turns in one process, with the same random weights. No speed
is shown unless our result is as near to that of 2023 in float32 as `parity` wants it.
"""

from contextlib import contextmanager
from statistics import median

from benchmarks import baseline_2023, blip2, machine, parity, train, workload
from minigpt4.common.device import resolve_device

BATCH = 8


class Part:
    """A command; `ways` takes (model, batch) and returns {way: function that returns a tensor}."""

    def __init__(self, title, ways, flops):
        self.HELP, self.ways, self.flops = f"{title}, beside that of 2023 and of transformers", ways, flops

    def add_arguments(self, parser):
        sizes = [size for size in workload.SIZES if size not in ("7b", "13b")]  # float32 copies have to fit
        parser.add_argument("--size", choices=sizes, default="toy", help="7b-thin: full width, few layers")
        parser.add_argument("--stage", type=int, choices=(1, 2), default=1, help="whose texts (default: %(default)s)")
        parser.add_argument("--batch", type=int, default=BATCH)
        parser.add_argument("--device", default="auto")
        parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="(default: fp16 on a GPU, else bf16)")
        parser.add_argument("--rounds", type=int, default=5)

    def run(self, args):
        """Measure, print the table, return the figures."""
        from minigpt4.models.base_model import DTYPES

        device = resolve_device(args.device)
        half_name = "fp16" if device.type == "cuda" else "bf16"
        dtype = args.dtype or half_name
        half = workload.random_model(args.size, DTYPES[half_name if dtype == "fp32" else dtype], device, args.stage)
        wide, batch = workload.in_float32(half), workload.batches(half, args.stage, args.batch, 1)[0]
        wide_ways, half_ways = self.ways(wide, batch), self.ways(half, batch)
        exact = wide_ways["2023"]()
        errors = {
            way: {"fp32": distance(wide_ways[way](), exact), "half": distance(half_ways[way](), exact)}
            for way in wide_ways
        }
        limit = parity.HALF_LIMIT * errors["2023"]["half"]
        passed = errors["ours"]["fp32"] <= parity.FLOAT32_LIMIT and errors["ours"]["half"] <= limit
        figures = {"size": args.size, "stage": args.stage, "batch": args.batch, "dtype": dtype, "errors": errors}
        if passed:
            model, ways = (wide, wide_ways) if dtype == "fp32" else (half, half_ways)
            figures["seconds"] = train.take_turns(ways, args.rounds, device)
            ceiling = train.matmul_flops(device, dtype)
            figures |= train.compared(figures["seconds"], self.flops(model, batch), ceiling)
        print_table(figures)
        print("PASS" if passed else "FAIL: the errors are too large, no speed is shown")
        return {**figures, "passed": passed, "seed": workload.SEED, **machine.description("transformers", "timm")}


def vit_ways(model, batch):
    stock = blip2.blip2(model)
    return {
        "2023": _forward(model, lambda: see(model, batch), as_2023=True),
        "transformers": _forward(model, lambda: stock.vision_model(pixel_values=batch["image"]).last_hidden_state),
        "ours": _forward(model, lambda: see(model, batch)),
    }


def see(model, batch):
    """Return what the Q-Former is given for the images."""
    return model.ln_vision(model.visual_encoder(batch["image"]))


def qformer_ways(model, batch):
    """Return two ways: the Q-Former is made of transformers' layers, so theirs is ours."""
    seen = _forward(model, lambda: see(model, batch))()
    query = lambda: model.Qformer(model.query_tokens, seen)  # noqa: E731
    return {"2023": _forward(model, query, as_2023=True), "ours": _forward(model, query)}


def _forward(model, function, as_2023=False):
    import torch

    @torch.no_grad()
    def run():
        with model.maybe_autocast():
            if not as_2023:
                return function()
            with baseline_2023.plain_vision(model):
                return function()

    return run


def llm_ways(model, batch):
    """Return ways to the gradient of the loss with respect to what the LLM is given for the images."""
    import torch

    with torch.no_grad():
        pictures, mask = model.encode_img(batch["image"])
    pictures.requires_grad_()

    def gradient(loss):
        def run():
            pictures.grad = None
            with _given(model, pictures, mask):
                (1024 * loss()).backward()  # as a GradScaler, see parity
            return pictures.grad / 1024

        return run

    return {
        "2023": gradient(lambda: baseline_2023.loss(model, batch)),
        "transformers": gradient(lambda: _stock_loss(model, batch)),
        "ours": gradient(lambda: model(batch)["loss"]),
    }


@contextmanager
def _given(model, pictures, mask):
    """Let the model take these for its images inside the block."""
    model.encode_img = lambda image: (pictures, mask)
    try:
        yield
    finally:
        del model.encode_img


def _stock_loss(model, batch):
    inputs, _ = model.build_inputs(batch)
    with blip2.stock_attention(model.llama_model), model.maybe_autocast():
        return model.llama_model(**inputs, use_cache=False).loss


def llm_flops(model, batch):
    """Return the FLOPs that the LLM cannot do without, forward and back to the images."""
    import torch

    with torch.no_grad():
        vision = workload.count_flops(lambda: model.encode_img(batch["image"]))
    projection = 2 * len(batch["image"]) * model.query_tokens.shape[1] * model.llama_proj.weight.numel()
    return workload.useful_flops(model, batch) - vision - projection


def distance(found, expected):
    """Return the relative distance of two tensors, in float32."""
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def print_table(figures):
    print(f"{figures['size']}, batch {figures['batch']}, stage {figures['stage']}, {figures['dtype']}")
    print(f"{'':<16}{'error, fp32':>14}{'error, half':>14}{'seconds':>36}{'x 2023':>8}{'of limit':>10}")
    for way, errors in figures["errors"].items():
        cells = f"{errors['fp32']:>14.1e}{errors['half']:>14.2e}"
        if values := figures.get("seconds", {}).get(way):
            spread = f"{median(values):.4g} [{min(values):.4g} .. {max(values):.4g}]"
            cells += f"{spread:>36}{figures['ratio'][way]:>8.2f}{figures['share of limit'][way]:>10.1%}"
        print(f"{way:<16}{cells}")


VIT = Part("the ViT's forward pass", vit_ways, lambda *args: workload.count_flops(vit_ways(*args)["ours"]))
QFORMER = Part(
    "the Q-Former's forward pass", qformer_ways, lambda *args: workload.count_flops(qformer_ways(*args)["ours"])
)
LLM = Part("the LLM forward and backward", llm_ways, llm_flops)
