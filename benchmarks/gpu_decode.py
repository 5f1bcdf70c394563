"""Tokens a second of a 7B LLM of random weights on a GPU, beside what its memory allows.

The limit: every token reads all weights but the embedding table, and the keys and values so far, at the rate at which
this GPU copies memory in this run.
"""

import time
from statistics import median

SHAPES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "quick": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8},
}
KINDS = {"fp16": "none", "int8": "int8", "int4": "int4"}
PROMPT, TOKENS, ROUNDS = 256, 128, 5


def run(model_class, is_quick):
    """Measure, print a row for each kind of weights, return the figures."""
    import torch

    from minigpt4.models.llm.quantization import quantise

    size, device = "quick" if is_quick else "7B", torch.device("cuda")
    copied = copy_rate(torch)
    print(f"\n{torch.cuda.get_device_name()}: copies {copied / 1e12:.2f} TB/s; {size}, {TOKENS} tokens after {PROMPT}")
    print(f"{'':<6}{'tokens/s':>24}{'without graph':>16}{'generate':>12}{'limit':>10}{'of limit':>10}{'GiB':>8}")
    figures = {"copy_bytes_per_s": copied, "size": size}
    for name, kind in KINDS.items():
        torch.manual_seed(0)
        llm = model_class(SHAPES[size], torch.float16, device).llama_model
        if kind != "none":
            quantise(llm, kind, device)
        figures[name] = measure(llm, copied)
        row = figures[name]
        speeds = row["tokens_per_s"]
        spread = f"{median(speeds['graph']):.1f} [{min(speeds['graph']):.1f} .. {max(speeds['graph']):.1f}]"
        print(
            f"{name:<6}{spread:>24}{median(speeds['plain']):>16.1f}{median(speeds['generate']):>12.1f}"
            f"{row['limit']:>10.1f}{row['of_limit']:>10.0%}{torch.cuda.memory_allocated() / 2**30:>8.1f}"
        )
        del llm
        torch.cuda.empty_cache()
    return figures


def measure(llm, copied):
    """Return tokens a second of the recorded steps, the plain steps and generate, and of the limit."""
    import torch

    from minigpt4.models.llm.decoding import Decoder

    ids = torch.randint(100, 30_000, (1, PROMPT), device="cuda")
    with torch.no_grad():
        embeds = llm.get_input_embeddings()(ids)
    decoders = {"graph": Decoder(llm), "plain": Decoder(llm, static=False)}
    speeds = {"graph": [], "plain": [], "generate": []}
    for _ in range(ROUNDS + 1):  # the first one records and compiles
        for name, decoder in decoders.items():
            speeds[name].append(_engine(torch, decoder, embeds))
        speeds["generate"].append(_generate(torch, llm, embeds))
    if not decoders["graph"].static:
        raise RuntimeError("the decoding step was not recorded (see the warning above)")
    speeds = {name: values[1:] for name, values in speeds.items()}
    config = llm.config
    tensors = [*llm.parameters(), *(buffer for name, buffer in llm.named_buffers() if name.endswith("scale"))]
    weights = sum(tensor.nbytes for tensor in tensors) - llm.get_input_embeddings().weight.nbytes
    keys_values = 2 * config.num_hidden_layers * config.hidden_size * 2 * (PROMPT + TOKENS // 2)
    limit = copied / (weights + keys_values)
    return {
        "tokens_per_s": speeds,
        "bytes_per_token": weights + keys_values,
        "limit": limit,
        "of_limit": median(speeds["graph"]) / limit,
    }


def _engine(torch, decoder, embeds):
    """Return tokens a second of greedy steps, the choice of the token on the GPU included."""
    with torch.no_grad():
        past = decoder.new_past()
        positions = torch.arange(PROMPT, device="cuda")[None]
        tokens = decoder.prefill(past, embeds, positions, None).argmax(-1)
        positions = positions[:, -1:]
        with decoder.steps(past, 1, PROMPT + TOKENS + 1) as step:
            for number in range(TOKENS):
                if number == 1:  # the first step may record the graph
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                positions = positions + 1
                tokens = step(tokens, positions, None).float().argmax(-1)
                tokens.tolist()  # the engine looks at every token before it goes on
            torch.cuda.synchronize()
            return (TOKENS - 1) / (time.perf_counter() - start)


def _generate(torch, llm, embeds):
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device="cuda")
    seconds = []
    for count in (1, TOKENS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
        llm.generate(inputs_embeds=embeds, attention_mask=mask, **options)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return (TOKENS - 1) / (seconds[1] - seconds[0])


def copy_rate(torch):
    """Return bytes a second, read and written, of copies of 1 GiB."""
    source = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    target, rates = torch.empty_like(source), []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        rates.append(2 * source.nbytes / (time.perf_counter() - start))
    return median(rates)
