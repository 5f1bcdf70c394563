"""What a training step executes at real size, counted with tensors without values: no weights, no clock, no GPU."""

from benchmarks import baseline_2023, machine, memory, workload

HELP = "FLOPs, kernels and waits of a training step at real size, counted, beside what it cannot do without"
BATCHES = {1: 16, 2: 12}
LIMIT = 1.02  # executed / useful


def add_arguments(parser):
    parser.add_argument("--quick", action="store_true", help="7B alone")


def run(args):
    """Count, print the table, return the figures."""
    rows = [
        row for size in (["7b"] if args.quick else ["7b", "13b"]) for stage in BATCHES for row in measure(size, stage)
    ]
    print(f"{'':<32}{'TFLOP':>10}{'of useful':>12}{'kernels':>10}{'waits for the GPU':>20}")
    for row in rows:
        name = f"{row['size']} stage {row['stage']} batch {BATCHES[row['stage']]} {row['way']}"
        cells = f"{row['flops'] / 1e12:>10.2f}{row['flops'] / row['useful']:>12.3f}{row['kernels']:>10}"
        print(f"{name:<32}{cells}{row['waits']:>20}")
    passed = all(row["flops"] <= LIMIT * row["useful"] and not row["waits"] for row in rows if row["way"] == "lean")
    print(f"{'PASS' if passed else 'FAIL'}: lean executes at most {LIMIT} of what is useful, and waits for nothing")
    return {"rows": rows, "passed": passed, **machine.description("transformers", "timm")}


def measure(size, stage):
    """Return a row for each way. FLOPs are those of matrix products, with attention text by text."""
    import torch

    from minigpt4.common.memory import without_values

    rows = []
    for way in ("2023", "padded", "lean"):
        model, batch = memory.setup(size, stage, BATCHES[stage])
        model.llm_backend = "padded" if way == "2023" else way
        loss = (lambda s: baseline_2023.loss(model, s)) if way == "2023" else (lambda s: model(s)["loss"])  # noqa: B023
        found = memory.cost(model, batch, loss)
        model, batch = memory.setup(size, stage, BATCHES[stage])
        model.llm_backend = "padded" if way == "2023" else way
        with without_values(model):
            batch["image"] = torch.empty(BATCHES[stage], 3, model.image_size, model.image_size)
            executed = workload.count_flops(lambda: loss(batch).backward())  # noqa: B023
            useful = workload.useful_flops(model, batch)
        # without values nothing can be read: a step that waited for the GPU would have ended in an error
        row = {"size": size, "stage": stage, "way": way, "flops": executed, "useful": useful}
        rows.append(row | {"kernels": found.launches, "waits": 0})
    return rows
