"""Tokens a second of requests that wait in the server at the same time: answered in batches, and one by one.

Both ways alternate in one process, with the same weights, images and questions, through the server's own queue, without
HTTP. Each request is a conversation of its own, so that the prefix cache does not help. No speed is printed unless both
give the same greedy answers.
"""

import asyncio
import time
from argparse import Namespace
from functools import partial

import torch

from benchmarks import chat
from benchmarks.harness import QUICK, ROUNDS, NotEqual, row, take_turns
from minigpt4.conversation.conversation import CHATML, Chat, Conversation
from minigpt4.models import MiniGPT4
from minigpt4.serving.openai_batches import Batches, Job, Pixels

HELP = "tokens a second of requests that wait together, in batches and one by one"
QUESTION = 40  # characters; each is a token here
FULL, SHORT = (8, 48), (4, 8)  # number of requests, tokens of each answer
OPTIONS = {
    "--quick": QUICK | {"help": "a tiny LLM and four requests, to see that it runs; no gates"},
    "--rounds": ROUNDS,
}


def run(args: Namespace) -> dict:
    """Measure; return the rows. Raises NotEqual where a batch changes an answer."""
    size, (num_requests, length) = ("chat-quick", SHORT) if args.quick else ("chat", FULL)
    engine = Chat(chat.chat_model(size, torch.float32), None)
    batches = {"batches": Batches(engine, num_requests), "alone": Batches(engine, 1)}
    answers = set()

    def speed(way: str) -> float:
        start = time.perf_counter()
        ids = asyncio.run(answered(batches[way], engine, num_requests, length))
        seconds = time.perf_counter() - start
        answers.add(ids)
        return num_requests * length / seconds

    found = take_turns({way: partial(speed, way) for way in batches}, args.rounds, warm_up=1)
    for each in batches.values():
        each.close()
    if len(answers) > 1:
        raise NotEqual("a batch changes the answers of its requests")
    print(
        f"equal answers: yes. Here the column 2023 is one request after the other, as 2023's page answers: {size}"
    )
    name = f"serve: {num_requests} requests of an image and {length} tokens that wait"
    gate = None if args.quick else 1.0
    rows = [row(name, "1/s", found["batches"], found["alone"], more_is_better=True, at_least=gate)]
    return {"rows": rows, "size": size}


async def answered(batches: Batches, engine: Chat, num_requests: int, length: int) -> tuple:
    """Return the token ids of the greedy answers to requests that are queued at the same time."""
    jobs = [request(engine, number, length) for number in range(num_requests)]
    batches.add(*jobs)
    for job in jobs:
        async for _ in job.pieces():
            pass
    return tuple(tuple(job.answer.ids) for job in jobs)


def request(engine: Chat, number: int, length: int) -> Job:
    """Return a request about an image of its own, which is answered with `length` tokens."""
    conv, model = Conversation(CHATML), engine.model
    conv.append_image()
    engine.ask(f"{number}: what is this? ".ljust(QUESTION, "x"), conv)
    settings = {"temperature": 0, "seed": None, "max_new_tokens": length, "min_length": length + 2}
    return Job(conv, [Pixels(bytes([number]), pixels(model, number))], settings)


def pixels(model: MiniGPT4, seed: int) -> torch.Tensor:
    """Return a random image [3, S, S]."""
    return torch.rand(
        3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(seed)
    )
