"""Memory of a training step at real size, counted with tensors that have shapes and no values: no weights, no GPU."""

from benchmarks import machine, workload

HELP = "memory of a training step at real size, counted: no weights, no GPU; the 2023 baseline beside the published log"
LOG = {1: (16, 22193), 2: (12, 36093)}  # stage -> (batch, "max mem" in MiB). Source: the logs of the 2023 release
LOG_TOLERANCE = 0.07
# Tokens before and behind the image of the longest prompt of 2023, a running maximum's. Counted by hand.
LONGEST_PROMPT = (8, 23)
BATCHES = {1: 64, 2: 12}  # of the official configurations
GATES = {1: 24.5, 2: 21.5}  # GiB at 7B, as it stands
# Of 7B, a token and layer in half precision: input, q, k, v, attention's output, residual; gate and up of the MLP.
FLOOR_KB = (6 * 4096 + 2 * 11008) * 2 / 1000
CARDS = (12, 16, 24, 48, 80)  # GB


def add_arguments(parser):
    parser.add_argument("--quick", action="store_true", help="7B in half precision alone, and no table of cards")


def run(args):
    """Count, print the tables, return the figures."""
    log = {stage: baseline(stage) for stage in LOG}
    print("7B as 2023 computes it, MiB: counted, in the published log, difference")
    for stage, counted in log.items():
        batch_size, logged = LOG[stage]
        print(f"  stage {stage}, batch {batch_size}: {counted:.0f}  {logged}  {counted / logged - 1:+.1%}")
    sizes, kinds = (["7b"], ["none"]) if args.quick else (["7b", "13b"], ["none", "int8", "nf4"])
    rows = [row for size in sizes for stage in BATCHES for row in table(size, stage, kinds)]
    print(
        f"\nours, texts of the stages' lengths, GiB\n{'':<40}{'weights':>9}{'held':>9}{'peak':>9}{'KB/token/layer':>16}"
    )
    for row in rows:
        name = f"{row['size']} stage {row['stage']} batch {row['batch']} {row['kind']}"
        name += " checkpointing" * row["checkpointing"]
        print(f"{name:<40}{row['weights']:>9.2f}{row['held']:>9.2f}{row['peak']:>9.2f}{row['kb']:>16.1f}")
    passed = all(abs(counted / LOG[stage][1] - 1) <= LOG_TOLERANCE for stage, counted in log.items())
    plain = {r["stage"]: r["peak"] for r in rows if (r["size"], r["kind"], r["checkpointing"]) == ("7b", "none", False)}
    passed &= all(plain[stage] <= gate for stage, gate in GATES.items())
    gates = ", ".join(f"stage {stage} <= {gate} GiB" for stage, gate in GATES.items())
    print(f"{'PASS' if passed else 'FAIL'}: 7B {gates}; the log within {LOG_TOLERANCE:.0%}")
    old = {stage: peak_of_2023(*setup("7b", stage, BATCHES[stage])) / 2**30 for stage in BATCHES}
    print("the same batches as 2023 computes them, 7B: " + ", ".join(f"stage {s} {gib:.2f}" for s, gib in old.items()))
    needs = {} if args.quick else cards(sizes)
    figures = {"log": log, "rows": rows, "2023": old, "cards": needs, "passed": passed}
    return {**figures, **machine.description("transformers", "timm")}


def baseline(stage):
    """Return the MiB of the 2023 step with the longest text and prompt that a run meets."""
    model, batch = setup("7b", stage, LOG[stage][0], prompt=LONGEST_PROMPT)
    batch["text_input"][0] = "a" * workload.STAGES[stage][3]
    return peak_of_2023(model, batch) / 2**20


def peak_of_2023(model, batch):
    """Return the bytes of a step as 2023 computes it."""
    from benchmarks import baseline_2023

    tables = model.llama_model.config.num_hidden_layers * 2 * 2048 * 128 * 4  # float32 cosines and sines, in each layer
    return cost(model, batch, lambda samples: baseline_2023.loss(model, samples)).peak + tables


def table(size, stage, kinds):
    """Return the rows of a size and stage at the official batch: kinds of weights x checkpointing."""
    rows = []
    for kind in kinds:
        for checkpointing in (False, True):
            model, batch = setup(size, stage, BATCHES[stage], kind, checkpointing)
            found = cost(model, batch, lambda samples: model(samples)["loss"])  # noqa: B023
            row = {"size": size, "stage": stage, "batch": BATCHES[stage], "kind": kind, "checkpointing": checkpointing}
            row |= {name: getattr(found, name) / 2**30 for name in ("weights", "held", "peak")}
            rows.append(row | {"kb": kb_per_token_and_layer(model, batch, found)})
    return rows


def cards(sizes):
    """Print and return the largest batch, up to the official one, that each card takes with texts of full length."""
    import torch

    from minigpt4.common.memory import OUTSIDE
    from minigpt4.models.memory import count_step

    found = {}
    print("\nlargest batch (of the official one) on a card of .. GB, texts of full length")
    print(f"{'':<32}" + "".join(f"{card:>8}" for card in CARDS))
    for size, stage in ((size, stage) for size in sizes for stage in BATCHES):
        for kind in ("none", "int8", "nf4"):
            for checkpointing in (False, True):
                peaks = []
                for batch_size in (1, BATCHES[stage]):
                    model, _ = setup(size, stage, 1, kind, checkpointing)
                    batch = {"text_input": ["a" * workload.STAGES[stage][3]] * batch_size}
                    loss = lambda samples, model=model: model(samples)["loss"]  # noqa: E731
                    peaks.append(count_step(model, batch, torch.device("cuda"), loss).peak + OUTSIDE)
                slope = (peaks[1] - peaks[0]) / (BATCHES[stage] - 1)
                fits = [int(min(BATCHES[stage], 1 + (card * 2**30 - peaks[0]) // slope)) for card in CARDS]
                name = f"{size} stage {stage} {kind}{' checkpointing' * checkpointing}"
                found[name] = dict(zip(CARDS, (max(0, batch) for batch in fits), strict=True))
                print(f"{name:<32}" + "".join(f"{batch or '-':>8}" for batch in found[name].values()))
    return found


def setup(size, stage, batch_size, kind="none", checkpointing=False, prompt=None):
    """Return a model on the meta device with the prompt of a stage, or one of `prompt` tokens, and a batch of texts."""
    from tempfile import TemporaryDirectory

    import torch

    from minigpt4.models import MiniGPT4, memory
    from minigpt4.text.rows import IMAGE_SLOT

    with TemporaryDirectory() as folder:
        cfg = workload.model_config(size, folder)
        cfg.llm_quantization, cfg.llm_checkpointing = kind, checkpointing
        cfg.max_txt_len = workload.STAGES[stage][3]
        model = MiniGPT4.skeleton(cfg, torch.float16).train()
    model.llama_tokenizer = memory.tokenizer_of_characters()
    workload.use_stage(model, stage)
    if prompt and model.prompt_list:
        model.prompt_list = [f"{'a' * prompt[0]}{IMAGE_SLOT}{'b' * prompt[1]}"]
    return model, {"text_input": workload.texts(stage, batch_size)}


def cost(model, batch, loss):
    """Return the Cost of a step on a GPU."""
    import torch

    from minigpt4.models.memory import count_step

    return count_step(model, batch, torch.device("cuda"), loss)


def kb_per_token_and_layer(model, batch, found):
    """Return what a step of Cost `found` keeps for backward, beside what is there once."""
    return (found.held - found.weights) / num_tokens(model, batch) / model.llama_model.config.num_hidden_layers / 1000


def num_tokens(model, batch):
    """Return how many tokens a batch has without padding: prompt, image, text but for its last."""
    prompt = len(model.prompt_list[0]) - len("<ImageHere>") if model.prompt_list else 0
    return sum(1 + prompt + model.query_tokens.shape[1] + len(text) for text in batch["text_input"])
