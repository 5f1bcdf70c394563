"""What a training step computes at real size, counted with tensors that have shapes and no values: no weights, no GPU.

FLOPs are those of matrix products. Useful ones are what no exact way can do without (`workload.useful_flops`); a way
can be below them, because what all texts begin with is counted for each of them. Kernels are operations that fill
memory, before any compiler joins them. Nothing here can wait for the device: a tensor without a value has none to give.
"""

from benchmarks import machine, parity, workload

HELP = "FLOPs, useful FLOPs and kernels of a training step at 7B or 13B, counted without a GPU"
WAYS = ("2023", "packed", "lean")
BATCH = {1: 64, 2: 12}  # Source: the 2023 release, stage 1 over four GPUs of 16 each, stage 2 on one
GATE = 1.02  # of the fastest way: FLOPs executed over useful ones


def add_arguments(parser):
    parser.add_argument("--size", choices=list(workload.SIZES), default="7b")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="(default: both)")
    parser.add_argument("--batch", type=int, help=f"(default: stage 1 {BATCH[1]}, stage 2 {BATCH[2]})")


def run(args):
    """Count, print the table, return the figures."""
    stages = [args.stage] if args.stage else list(workload.STAGES)
    found = {stage: count(args.size, stage, args.batch or BATCH[stage]) for stage in stages}
    print(f"{args.size}; for each sample: TFLOP executed, useful ones, their ratio, kernels started in a step")
    for stage, figures in found.items():
        useful = figures["useful"] / figures["batch"]
        for way, executed in figures["flops"].items():
            ratio, kernels = executed / figures["useful"], figures["kernels"][way]
            name, each = f"stage {stage}, batch {figures['batch']}, {way}", executed / figures["batch"]
            print(f"{name:<32}{each / 1e12:>10.3f}{useful / 1e12:>10.3f}{ratio:>8.3f}{kernels:>8}")
    passed = all(figures["flops"]["lean"] <= GATE * figures["useful"] for figures in found.values())
    print(f"lean at most {GATE} of the useful ones: {'PASS' if passed else 'FAIL'}")
    figures = {"size": args.size, "seed": workload.SEED, "stages": found, "passed": passed}
    return {**figures, **machine.description("transformers", "timm")}


def count(size, stage, batch_size, ways=WAYS):
    """Return {"batch", "useful", "flops": {way: FLOPs}, "kernels": {way: number}} of a step."""
    import torch

    from minigpt4.common.memory import without_values
    from minigpt4.models import rehearsal

    model = skeleton(size)
    workload.use_stage(model, stage)
    loss = lambda way: lambda batch: parity.loss_of(model, None, way, batch)  # noqa: E731
    with without_values(model):
        batch = workload.batches(model, stage, batch_size, 1)[0]
        useful = workload.useful_flops(model, batch)
        flops = {way: workload.count_flops(lambda way=way: loss(way)(batch).backward()) for way in ways}
    texts, gpu = {"text_input": batch["text_input"]}, torch.device("cuda", 0)
    kernels = {way: rehearsal.count_step(model, texts, gpu, loss(way)).launches for way in ways}
    return {"batch": batch_size, "useful": useful, "flops": flops, "kernels": kernels}


def skeleton(size):
    """Return the MiniGPT4 of a size on the meta device, with a tokenizer of one token a character."""
    from tempfile import TemporaryDirectory

    import torch

    from minigpt4.models import MiniGPT4, rehearsal

    with TemporaryDirectory() as folder:
        # bfloat16 is as wide as float16, which a CPU has no autocast for
        model = MiniGPT4.skeleton(workload.model_config(size, folder), torch.bfloat16).train()
    model.llama_tokenizer = rehearsal.tokenizer_of_characters()
    return model
