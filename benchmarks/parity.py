"""Loss and gradient of every way to train, beside the plain statement of 2023: no speed counts unless they agree.

An LLM of fewer bits is another model: its distance is shown, and judges nothing.
"""

from tempfile import TemporaryDirectory

from benchmarks import baseline_2023, blip2, machine, workload
from minigpt4.common.device import resolve_device

HELP = (
    "loss and gradient errors of every way to run the LLM, beside what 2023 computes, in float32 and in half precision"
)
FLOAT32_LIMIT = 5e-6  # relative, of loss and of gradient
HALF_LIMIT = 1.05  # error against float32, as a multiple of the baseline's own
OTHERS = ("2023", "transformers")
OURS = ("padded", "packed", "lean")  # and "compiled" where it is asked for
WAYS = (*OTHERS, *OURS)


def add_arguments(parser):
    parser.add_argument("--size", choices=list(workload.SIZES), default="toy")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("fp16", "bf16"), help="half precision (default: fp16 on a GPU, else bf16)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--compiled", action="store_true", help="also with model.compile (a minute more)")
    parser.add_argument(
        "--quantised", action="store_true", help="also with the frozen LLM in each kind of few bits that trains here"
    )


def run(args):
    """Measure both stages, print a table, return the figures."""
    device = resolve_device(args.device)
    dtype = args.dtype or ("fp16" if device.type == "cuda" else "bf16")
    stages, quantised = {}, {}
    for stage in workload.STAGES:
        stages[stage], quantised[stage] = measure(args, stage, device, dtype)
    print(f"{args.size}, {args.batches} batches of {args.batch}; errors relative to 2023 in float32")
    print_table(stages, dtype, quantised)
    passed = all(verdict(errors) for errors in stages.values())
    print("PASS" if passed else "FAIL", f"(float32 <= {FLOAT32_LIMIT:g}, {dtype} <= {HALF_LIMIT} times that of 2023)")
    figures = {"size": args.size, "dtype": dtype, "seed": workload.SEED, "errors": stages, "quantised": quantised}
    return {**figures, "passed": passed, **machine.description("transformers", "timm")}


def measure(args, stage, device, dtype):
    """Return ({way: {"loss", "gradient", "half gradient"}}, {kind of quantised LLM: {"loss", "half gradient"}}).

    These are relative errors, the half ones that of `dtype`.
    """
    from minigpt4.models.base_model import DTYPES

    half = workload.random_model(args.size, DTYPES[dtype], device, stage)
    batches = workload.batches(half, stage, args.batch, args.batches)
    wide = workload.in_float32(half)
    if args.compiled:
        compile_vision(wide, half)
    exact = steps(wide, "2023", batches)
    errors = of_models(exact, wide, half, batches, args.compiled)
    return errors, of_kinds(exact, half, batches, device) if args.quantised else {}


def compile_vision(*models):
    """Compile the ViTs' blocks; what is not the compiled way runs them as they are (`loss_of`)."""
    from minigpt4.models.vision.eva_vit import compile_blocks

    for model in models:
        compile_blocks(model.visual_encoder, model.device)


def of_models(exact, wide, half, batches, is_compiled=False):
    """Return the errors of each way, of a model in float32 and one of the same weights in half precision.

    `exact`: `steps` of the first as 2023. `is_compiled`: also of the compiled way.
    """
    stock, errors = [blip2.blip2(model) for model in (wide, half)], {}
    for way in [*WAYS, *["compiled"] * is_compiled]:
        found, found_half = steps(wide, way, batches, stock[0]), steps(half, way, batches, stock[1])
        errors[way] = {
            "loss": loss_error(found, exact),
            "gradient": distance(found, exact),
            "half gradient": distance(found_half, exact),
        }
    return errors


def of_kinds(exact, half, batches, device):
    """Return {kind: {"loss", "half gradient"}} of `half` with its LLM in each kind of few bits that trains here.

    The LLM of `half` is given up.
    """
    from minigpt4.models.llm import backends, language_model, quantization

    kinds, errors = [kind for kind in quantization.KINDS[1:] if not quantization.refusal_to_train(kind, device)], {}
    with TemporaryDirectory() as folder:
        half.llama_model.save_pretrained(folder)
        for kind in kinds:
            half.llama_model = language_model.load_llm(folder, half.compute_dtype, device, kind)
            half.freeze("llama_model")
            with half.maybe_autocast():
                path = backends.choose(half.llama_model)
            found = steps(half, path, batches)
            errors[kind] = {"loss": loss_error(found, exact), "half gradient": distance(found, exact)}
    return errors


def steps(model, way, batches, stock=None):
    """Return [(loss, gradient of the projection's weight)] of batches."""
    found = []
    for batch in batches:
        model.zero_grad()
        loss = loss_of(model, stock, way, batch)
        (1024 * loss).backward()  # as a GradScaler: small gradients must not vanish in float16
        found.append((loss.item(), model.llama_proj.weight.grad.float() / 1024))
    return found


def loss_of(model, stock, way, batch):
    """Return the loss of a batch as one of WAYS, or the compiled one, computes it."""
    import torch

    with torch.compiler.set_stance("default" if way == "compiled" else "force_eager"):
        if way == "2023":
            return baseline_2023.loss(model, batch)
        if way == "transformers":
            return blip2.loss(stock, model, batch)
        model.llm_backend = way
        return model(batch)["loss"]


def loss_error(found, expected):
    """Return the largest relative error of the losses."""
    return max(abs(a - b) / b for (a, _), (b, _) in zip(found, expected, strict=True))


def distance(found, expected):
    """Return the relative distance of gradients, all batches together."""
    off = sum((a - b).square().sum().item() for (_, a), (_, b) in zip(found, expected, strict=True))
    return (off / sum(b.square().sum().item() for _, b in expected)) ** 0.5


def verdict(errors):
    """Whether all our ways are as exact as they have to be."""
    limit = HALF_LIMIT * errors["2023"]["half gradient"]
    return all(
        max(errors[way]["loss"], errors[way]["gradient"]) <= FLOAT32_LIMIT and errors[way]["half gradient"] <= limit
        for way in errors.keys() - OTHERS
    )


def print_table(stages, dtype, quantised=None):
    print(f"{'':<24}{'loss, fp32':>14}{'gradient, fp32':>16}{f'gradient, {dtype}':>16}{'times 2023':>12}")
    rows = [(stage, way, found) for stage, errors in stages.items() for way, found in errors.items()]
    rows += [
        (stage, f"{kind} LLM", found) for stage, errors in (quantised or {}).items() for kind, found in errors.items()
    ]
    for stage, name, found in rows:
        gradient = f"{found['gradient']:.1e}" if "gradient" in found else "-"
        ratio = found["half gradient"] / stages[stage]["2023"]["half gradient"]
        cells = f"{found['loss']:>14.1e}{gradient:>16}{found['half gradient']:>16.2e}{ratio:>12.3f}"
        print(f"{f'stage {stage}, {name}':<24}{cells}")
