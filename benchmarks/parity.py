"""Errors of loss and gradient of every way to train, relative to the 2023 baseline: no speed counts unless they agree.

The reference is the baseline in float64. Where the baseline in float32 is itself further off than the limit, as on a GPU
whose matrix products sum in another order, ours may be as far off. A quantised LLM is another model: its distance is
shown, but not judged.
"""

from argparse import Namespace
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from benchmarks import baseline_2023, blip2, workload
from benchmarks.harness import DEVICE, row
from minigpt4.common.device import resolve_device
from minigpt4.models.base_model import DTYPES
from minigpt4.models.llm import language_model, quantization
from minigpt4.models.vision.eva_vit import compile_blocks

HELP = "loss and gradient errors of every way to run the LLM, beside what 2023 computes"
FLOAT32_LIMIT = 5e-6  # relative, of loss and of gradient
AS_2023 = 1.05  # largest error permitted, as a multiple of the baseline's in the same precision
OTHERS = ("2023", "transformers")
OURS = ("padded", "packed", "lean")
COMPILED = ("compiled", "recorded")  # only on request
REPEATS = 3  # of a recorded step: the second one records, the third is a replay
WAYS = (*OTHERS, *OURS)
OPTIONS = {
    "--size": {"choices": list(workload.SIZES), "default": "toy"},
    "--device": DEVICE,
    "--dtype": {
        "choices": ("fp16", "bf16"),
        "help": "half precision (default: fp16 on a GPU, else bf16)",
    },
    "--batch": {"type": int, "default": 4},
    "--batches": {"type": int, "default": 4},
    "--compiled": {"action": "store_true", "help": "also with model.compile (a minute more)"},
    "--quantised": {
        "action": "store_true",
        "help": "also with the LLM in each kind of few bits that trains here",
    },
}
Steps = list[tuple[float, Tensor]]  # loss, and gradient of the projection's weight


def run(args: Namespace) -> dict:
    """Measure both stages, print the errors of every way; return rows with the largest errors of ours."""
    device = resolve_device(args.device)
    dtype = args.dtype or ("fp16" if device.type == "cuda" else "bf16")
    stages, quantised = {}, {}
    rows = []
    for stage in workload.STAGES:
        stages[stage], quantised[stage] = measure(args, stage, device, dtype)
        rows += rows_of(stage, stages[stage], dtype)
    print(
        f"{args.size}, {args.batches} batches of {args.batch}; errors relative to 2023 in float64"
    )
    print_table(stages, dtype, quantised)
    figures = {
        "size": args.size,
        "dtype": dtype,
        "seed": workload.SEED,
        "errors": stages,
        "quantised": quantised,
    }
    return {"rows": rows, **figures}


def rows_of(stage: int, errors: dict, dtype: str) -> list[dict]:
    """Return the rows of a stage: the largest error of our ways, with transformers' beside it."""
    rows, names = ([], {"loss": "loss error, float32", "gradient": "gradient error, float32"})
    for kind, name in (names | {"half gradient": f"gradient error, {dtype}"}).items():
        old, stock = ([errors[way][kind]] for way in OTHERS)
        worst = [max(each[kind] for way, each in errors.items() if way not in OTHERS)]
        if kind in names:
            gate = {"at_most": max(FLOAT32_LIMIT, AS_2023 * old[0])}
            rows.append(row(f"stage {stage}: {name}", "", worst, None, stock, **gate))
        else:
            gate = {"at_least": 1 / AS_2023}
            rows.append(row(f"stage {stage}: {name}", "", worst, old, stock, **gate))
    return rows


def measure(args: Namespace, stage: int, device: torch.device, dtype: str) -> tuple[dict, dict]:
    """Return ({way: {"loss", "gradient", "half gradient"}}, {kind of quantised LLM: {"loss", "half gradient"}}).

    These are relative errors: "loss" and "gradient" in float32 (of a quantised LLM in `dtype`), "half gradient" in `dtype`.
    """
    half = workload.random_model(args.size, DTYPES[dtype], device, stage)
    batches = workload.batches(half, stage, args.batch, args.batches)
    exact = exact_steps(half, batches)
    wide = workload.in_float32(half)
    if args.compiled:
        compile_vision(wide, half)
    errors = of_models(exact, wide, half, batches, args.compiled)
    return errors, of_kinds(exact, half, batches, device) if args.quantised else {}


def exact_steps(model: nn.Module, batches: list[dict]) -> Steps:
    """Return `steps` of the 2023 baseline in float64."""
    in_float64 = [batch | {"image": batch["image"].double()} for batch in batches]
    return steps(workload.in_float64(model), "2023", in_float64)


def compile_vision(*models: nn.Module) -> None:
    """Compile the ViTs' blocks; ways not in COMPILED still run them uncompiled (see `loss_of`)."""
    for model in models:
        compile_blocks(model.visual_encoder, model.device)


def of_models(
    exact: Steps, wide: nn.Module, half: nn.Module, batches: list[dict], is_compiled: bool = False
) -> dict[str, dict[str, float]]:
    """Return the errors of each way, for a model in float32 and one with the same weights in half precision.

    `exact`: what `exact_steps` returns. `is_compiled`: include COMPILED.
    """
    wide_stock, half_stock = blip2.blip2(wide), blip2.blip2(half)
    errors = {}
    for way in WAYS + COMPILED * is_compiled:
        in_wide = steps(wide, way, batches, wide_stock)
        in_half = steps(half, way, batches, half_stock)
        errors[way] = {
            "loss": loss_error(in_wide, exact),
            "gradient": distance(in_wide, exact),
            "half gradient": distance(in_half, exact),
        }
    return errors


def of_kinds(
    exact: Steps, half: nn.Module, batches: list[dict], device: torch.device
) -> dict[str, dict[str, float]]:
    """Return {kind: {"loss", "half gradient"}} of `half` with its LLM in each kind of quantization that can train here.

    This replaces the LLM of `half`.
    """
    kinds = [
        kind for kind in quantization.KINDS[1:] if not quantization.refusal_to_train(kind, device)
    ]
    errors = {}
    with TemporaryDirectory() as folder:
        half.llama_model.save_pretrained(folder)
        for kind in kinds:
            half.llama_model = language_model.load_llm(folder, half.compute_dtype, device, kind)
            half.freeze("llama_model")
            quantised = steps(half, workload.chosen_path(half), batches)
            errors[kind] = {
                "loss": loss_error(quantised, exact),
                "half gradient": distance(quantised, exact),
            }
    return errors


def steps(model: nn.Module, way: str, batches: list[dict], stock: nn.Module | None = None) -> Steps:
    """Return (loss, gradient of the projection's weight) of each batch."""
    results = []
    for batch in batches:
        for _ in range(REPEATS if way == "recorded" else 1):
            model.zero_grad()
            loss = loss_of(model, stock, way, batch)
            (1024 * loss).backward()  # loss scaling: small gradients must not vanish in float16
        results.append((loss.item(), model.llama_proj.weight.grad.double() / 1024))
    return results


def loss_of(model: nn.Module, stock: nn.Module | None, way: str, batch: dict) -> Tensor:
    """Return the loss of a batch as one of WAYS or COMPILED computes it."""
    with torch.compiler.set_stance("default" if way in COMPILED else "force_eager"):
        if way == "2023":
            return baseline_2023.loss(model, batch)
        if way == "transformers":
            return blip2.loss(stock, model, batch)
        workload.use_path(model, way)
        return model(batch)["loss"]


def loss_error(found: Steps, expected: Steps) -> float:
    """Return the largest relative error of the losses."""
    return max(abs(a - b) / b for (a, _), (b, _) in zip(found, expected, strict=True))


def distance(found: Steps, expected: Steps) -> float:
    """Return the relative distance of the gradients, over all batches together."""
    off = sum((a - b).square().sum().item() for (_, a), (_, b) in zip(found, expected, strict=True))
    return (off / sum(b.square().sum().item() for _, b in expected)) ** 0.5


def verdict(errors: dict) -> bool:
    """Whether all our ways are within the limits."""
    return all(each["passed"] for each in rows_of(0, errors, ""))


def print_table(stages: dict, dtype: str, quantised: dict | None = None) -> None:
    """Print the errors of every way from {stage: errors}, and those of quantised LLMs."""
    print(
        f"{'':<24}{'loss, fp32':>14}{'gradient, fp32':>16}{f'gradient, {dtype}':>16}{'times 2023':>12}"
    )
    lines = []
    for stage, errors in stages.items():
        lines += [(stage, way, each) for way, each in errors.items()]
    for stage, errors in (quantised or {}).items():
        lines += [(stage, f"{kind} LLM", each) for kind, each in errors.items()]
    for stage, name, each in lines:
        gradient = f"{each['gradient']:.1e}" if "gradient" in each else "-"
        ratio = each["half gradient"] / stages[stage]["2023"]["half gradient"]
        cells = f"{each['loss']:>14.1e}{gradient:>16}{each['half gradient']:>16.2e}{ratio:>12.3f}"
        print(f"{f'stage {stage}, {name}':<24}{cells}")
