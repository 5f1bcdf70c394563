"""A training step, as it is and compiled, and an answer at 7B: python -m tests.counting_gpu.seven_billion."""

import json
import threading
import time
from dataclasses import replace

import torch

from benchmarks import chat, parity, workload
from minigpt4.common.config import as_section
from minigpt4.common.cuda_graphs import Recorder
from minigpt4.conversation.generation import StopRule, decode
from minigpt4.conversation.sampling import request_of
from minigpt4.models import MiniGPT4
from minigpt4.models.llm.decoding import StaticSteps
from tests.counting_gpu.counts import counts, reset

DEVICE = torch.device("cuda")


def training(model, stage, way):
    """Return what a step costs the host, and the GiB it needs at most."""
    workload.use_stage(model, stage)
    batches = workload.batches(model, stage, workload.OFFICIAL_BATCH[stage], 2)
    hosts = []
    for batch in batches * 3:  # the second time a step is recorded
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        reset()
        start = time.process_time()
        parity.loss_of(model, None, way, batch).backward()
        hosts.append(time.process_time() - start)
    found = counts()._asdict()
    return found | {"GiB": torch.cuda.max_memory_allocated() / 2**30, "host ms": min(hosts) * 1e3}


def answering(model):
    """Return the nodes of a recorded token, and what each token of a drawn answer costs beside them."""
    turn = chat.start(model.eval())
    turn.chat.ask("What is this?", turn.conv)
    reset()
    answer(turn, 2)
    found, several = {"nodes": counts().nodes, "recorded": turn.chat.decoder.static}, []
    for number in (4, 24):
        reset()
        answer(turn, number)
        several.append(counts())
    per_token = [
        (after - before) / 20 for before, after in zip(*(each[:3] for each in several), strict=True)
    ]
    return found | dict(zip(("launches", "waits", "copies"), per_token, strict=True))


def answer(turn, number):
    """Draw an answer of so many tokens without a seed; nothing ends it before, for its tokens mean nothing."""
    context = turn.chat._context(turn.conv, turn.images, request_of((), {}))
    context = replace(context, max_new_tokens=number)
    request, endless = request_of((), {}), StopRule(None, (), ())
    assert len(list(decode(turn.chat.decoder, [context], request, endless, 0))) == number


def threads(model):
    """Return the errors of a thread that draws without a seed while steps are recorded in this one, again and again."""
    errors, ended = [], threading.Event()
    turn = chat.start(model)
    turn.chat.ask("What is this?", turn.conv)
    turn.chat.decoder.static = False

    def draw():
        try:
            while not ended.is_set():
                answer(turn, 3)
        except Exception as error:
            errors.append(str(error))

    past = turn.chat.decoder.new_past()
    with torch.no_grad():
        embeds = model.llama_model.get_input_embeddings()(
            torch.zeros(1, 4, dtype=torch.long, device=DEVICE)
        )
        turn.chat.decoder.prefill(past, embeds, torch.arange(4, device=DEVICE)[None], None)
        other = threading.Thread(target=draw)
        other.start()
        for size in range(64, 70):
            StaticSteps(model.llama_model, past, size)
    ended.set()
    other.join()
    return errors


def recorded_passes(path, dtype):
    """Return which passes of a training in a type are recorded: those of the vision side, of the LLM."""
    model = workload.random_model("tiny", torch.float16, DEVICE).train()
    model = workload.in_float32(model) if dtype == torch.float32 else model
    workload.use_path(model, path)
    model.recorder = Recorder(is_checked=False)
    for batch in workload.batches(model, 1, 2, 1) * 3:
        model(batch)["loss"].backward()
    names = [key[0] for key in model.recorder._recordings]
    return [names.count("vision"), len(names) - names.count("vision")]


def late_backward():
    """Return what backward() says after another forward pass: the first one's tensors are overwritten."""
    recorder, weight = Recorder(is_checked=False), torch.ones(4, 4, device=DEVICE)
    x = torch.ones(4, device=DEVICE, requires_grad=True)
    outputs = [recorder("sines", lambda x: (weight @ x).sin(), x).sum() for _ in range(3)]
    outputs[2].backward()  # the newest one's are there
    try:
        outputs[1].backward()
    except RuntimeError as error:
        return str(error)
    return ""


def settled(**more):
    """Return `model.compile` and `model.cuda_graphs` of a training on this GPU whose section does not name them."""
    cfg = as_section({"llama_model": "any"} | more, MiniGPT4.Config, "model")
    MiniGPT4.settle_training(cfg, DEVICE, shard_llm=False)
    return cfg.compile, cfg.cuda_graphs


def main():
    """Print what was counted."""
    model = chat.chat_model("7b", torch.float16, DEVICE).train()
    tokenizer, model.llama_tokenizer = (
        model.llama_tokenizer,
        workload.memory.tokenizer_of_characters(),
    )
    found = {
        "default": settled(),
        "a vision side that trains": settled(freeze_vit=False),
        "LoRA": settled(lora_r=8),
        "late backward": late_backward(),
    }
    parity.compile_vision(model)
    model.kept_recorder = Recorder(is_checked=False)  # values mean nothing here
    for way in ("lean", "compiled", "recorded"):
        for stage in workload.OFFICIAL_BATCH:
            found[f"{way} {stage}"] = training(model, stage, way)
    model.llama_tokenizer = tokenizer
    found["answer"] = answering(model)
    found["errors of the other thread"] = threads(
        chat.chat_model("chat-quick", torch.float16, DEVICE)
    )
    found["recorded: lean, packed, lean in float32"] = [
        recorded_passes("lean", torch.float16),
        recorded_passes("packed", torch.float16),
        recorded_passes("lean", torch.float32),
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
