"""Memory and FLOPs of a training step at real size, counted with tensors that have shapes and no values.

No weights, no clock, no GPU. The 2023 step is counted beside ours, and beside the published logs of the 2023 release.
"""

from argparse import Namespace
from collections.abc import Callable
from itertools import product

import torch

from benchmarks import baseline_2023, workload
from benchmarks.harness import QUICK, Command, row
from benchmarks.workload import OFFICIAL_BATCH, meta_model
from minigpt4.common.memory import OUTSIDE
from minigpt4.models.memory import Cost, count_step

LOG = {1: (16, 22193), 2: (12, 36093)}  # stage -> (batch, "max mem" in MiB). Source: the logs of the 2023 release
LOG_TOLERANCE = 0.07
# Tokens before and behind the image of the longest prompt of 2023, a running maximum's. Counted by hand.
LONGEST_PROMPT = (8, 23)
GATES = {1: 24.5, 2: 21.5}  # GiB at 7B, in half precision and without activation checkpointing
FLOPS_LIMIT = 1.02  # executed / useful
# Of 7B, a token and layer in half precision: input, q, k, v, attention's output, residual; gate and up of the MLP.
FLOOR_KB = (6 * 4096 + 2 * 11008) * 2 / 1000
CARDS = (12, 16, 24, 48, 80)  # GB
KINDS = ("none", "int8", "nf4")
Loss = Callable[[dict], torch.Tensor]


def count_memory(args: Namespace) -> dict:
    """Return rows of all sizes and kinds of weights, and the largest batch of each card."""
    sizes, kinds = (["7b"], ["none"]) if args.quick else (["7b", "13b"], KINDS)
    rows = [log_row(stage) for stage in LOG]
    for size, stage in product(sizes, OFFICIAL_BATCH):
        rows += memory_rows(size, stage, kinds)
    return {"rows": rows, "cards": {} if args.quick else cards(sizes)}


def count_step_flops(args: Namespace) -> dict:
    """Return rows of FLOPs and kernels.

    Without values nothing can be read: a step that waited for the GPU would end in an error.
    """
    rows = []
    for size, stage in product(["7b"] if args.quick else ["7b", "13b"], OFFICIAL_BATCH):
        rows += flops_rows(size, stage)
    return {"rows": rows}


def log_row(stage: int) -> dict:
    """Return the row of what is counted for the 2023 step against its log: the relative distance."""
    (batch_size, logged), counted = LOG[stage], baseline(stage)
    print(f"stage {stage} as 2023, batch {batch_size}: counted {counted:.0f} MiB, in the log {logged} MiB")
    distance = abs(counted / logged - 1)
    return row(f"stage {stage}: count of 2023's step beside its log", "", [distance], at_most=LOG_TOLERANCE)


def baseline(stage: int) -> float:
    """Return the MiB of the 2023 step with the longest text and prompt that a run meets."""
    model, batch = meta_model("7b", stage, LOG[stage][0], prompt=LONGEST_PROMPT)
    batch["text_input"][0] = "a" * workload.STAGES[stage][3]
    return peak_of_2023(model, batch) / 2**20


def peak_of_2023(model: torch.nn.Module, batch: dict) -> int:
    """Return the bytes of a step as 2023 computes it."""
    tables = model.llama_model.config.num_hidden_layers * 2 * 2048 * 128 * 4  # float32 cosines and sines, in each layer
    return cost(model, batch, as_2023(model)).peak + tables


def memory_rows(size: str, stage: int, kinds: list[str]) -> list[dict]:
    """Return the rows of a size and stage at the official batch: kinds of weights x activation checkpointing."""
    batch_size, rows = OFFICIAL_BATCH[stage], []
    for kind, checkpointing in product(kinds, (False, True)):
        model, batch = meta_model(size, stage, batch_size, kind, checkpointing)
        counted = cost(model, batch, loss_of(model))
        is_plain = kind == "none" and not checkpointing
        name = f"stage {stage}: {size} peak, batch {batch_size}"
        name += f", {kind}" * (kind != "none") + ", checkpointing" * checkpointing
        old = [peak_of_2023(*meta_model(size, stage, batch_size)) / 2**30] if is_plain else None
        gate = GATES[stage] if is_plain and size == "7b" else None
        rows.append(row(name, "GiB", [counted.peak / 2**30], old, limit=counted.weights / 2**30, at_most=gate))
        if gate:
            kept = kb_per_token_and_layer(model, batch, counted)
            rows.append(row(f"stage {stage}: kept a token and layer", "kB", [kept], limit=FLOOR_KB))
    return rows


def flops_rows(size: str, stage: int) -> list[dict]:
    """Return the rows of what a step executes: TFLOP of matrix products, and kernels."""
    tflop, kernels = {}, {}
    for way, loss_of_way in (("2023", as_2023), ("ours", loss_of)):
        model, batch = meta_model(size, stage, OFFICIAL_BATCH[stage])
        kernels[way] = [cost(model, batch, loss_of_way(model)).launches]
        with workload.without_weights(size, stage) as (model, batch):
            loss = loss_of_way(model)
            tflop[way] = [workload.count_flops(lambda: loss(batch).backward()) / 1e12]  # noqa: B023
            useful = workload.useful_flops(model, batch) / 1e12
    name = f"stage {stage}: {size} step, batch {OFFICIAL_BATCH[stage]}"
    options = {"limit": useful, "at_most": FLOPS_LIMIT * useful}
    return [
        row(f"{name}, executed", "TFLOP", tflop["ours"], tflop["2023"], **options),
        row(f"{name}, kernels", "", kernels["ours"], kernels["2023"]),
    ]


def cards(sizes: list[str]) -> dict[str, dict[int, int]]:
    """Print and return the largest batch, up to the official one, that each card takes with texts of full length."""
    table = {}
    print("\nlargest batch (of the official one) on a card of .. GB, texts of full length")
    print(f"{'':<32}" + "".join(f"{card:>8}" for card in CARDS))
    for size, stage, kind, checkpointing in product(sizes, OFFICIAL_BATCH, KINDS, (False, True)):
        official, peaks = OFFICIAL_BATCH[stage], []
        for batch_size in (1, official):
            model, _ = meta_model(size, stage, 1, kind, checkpointing)
            batch = {"text_input": ["a" * workload.STAGES[stage][3]] * batch_size}
            peaks.append(cost(model, batch, loss_of(model)).peak + OUTSIDE)
        # memory grows by as much with each sample
        slope = (peaks[1] - peaks[0]) / (official - 1)
        largest = {card: int(min(official, 1 + (card * 2**30 - peaks[0]) // slope)) for card in CARDS}
        name = f"{size} stage {stage} {kind}{' checkpointing' * checkpointing}"
        table[name] = {card: max(0, batch) for card, batch in largest.items()}
        print(f"{name:<32}" + "".join(f"{batch or '-':>8}" for batch in table[name].values()))
    return table


def loss_of(model: torch.nn.Module) -> Loss:
    """Return the function that gives our loss of a batch."""
    return lambda samples: model(samples)["loss"]


def as_2023(model: torch.nn.Module) -> Loss:
    """Return the function that gives the loss of a batch as 2023 computes it."""
    return lambda samples: baseline_2023.loss(model, samples)


def cost(model: torch.nn.Module, batch: dict, loss: Loss) -> Cost:
    """Return the Cost of a step on a GPU."""
    return count_step(model, batch, torch.device("cuda"), loss)


def kb_per_token_and_layer(model: torch.nn.Module, batch: dict, counted: Cost) -> float:
    """Return the kB that a step of Cost `counted` keeps for backward, beside what is there once."""
    return (
        (counted.held - counted.weights) / num_tokens(model, batch) / model.llama_model.config.num_hidden_layers / 1000
    )


def num_tokens(model: torch.nn.Module, batch: dict) -> int:
    """Return how many tokens a batch has without padding: BOS, prompt, image, text but for its last."""
    rows, num_queries = workload.token_rows(model, batch), model.query_tokens.shape[1]
    return sum(len(row.before) + num_queries + len(row.behind) + len(row.ids) - 1 for row in rows)


MEMORY = Command(
    "memory of a training step at real size, counted; the 2023 baseline beside the published log",
    {"--quick": QUICK | {"help": "7B in half precision alone, and no table of cards"}},
    count_memory,
)
FLOPS = Command(
    "FLOPs and kernels of a training step at real size, counted, beside what it cannot do without",
    {"--quick": QUICK | {"help": "7B alone"}},
    count_step_flops,
)
