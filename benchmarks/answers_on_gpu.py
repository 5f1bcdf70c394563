"""The steps of `benchmarks gpu --part answers`."""

import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch

from benchmarks import chat, counted
from benchmarks.harness import NotEqual, row
from minigpt4.common.utils import first_line
from minigpt4.models.llm import quantization
from minigpt4.models.llm.decoding import Decoder

PROMPT, TOKENS = 200, 128  # tokens
TOLERANCE = 5e-2  # relative difference between logits of recorded and plain steps; that of backends in half precision
LENGTHS = (22, 101, 257, 773)  # tokens of the prompts
KINDS = {"none": "fp16", "int8": "int8", "int4": "int4"}
Step = tuple[str, Callable[[], dict], int]


def steps(args: Namespace) -> Iterator[Step]:
    """Yield (name, step, time limit in seconds), the most valuable figures first."""
    answers = Answers(args)
    yield "fp16", partial(answers.speed, "none"), 75
    yield "prompts of new lengths", answers.prompts, 30
    yield "two threads", answers.threads, 25
    for kind in ("int8", "int4"):
        yield kind, partial(answers.speed, kind), 60


class Answers:
    """The steps, and the one model that is on the GPU."""

    def __init__(self, args: Namespace):
        self.args, self.device = args, torch.device("cuda")
        self.size = "chat-quick" if args.rehearsal else "7b"
        self.copy_rate, self.model = None, None  # bytes a second; see `speed`

    def draw(self, kind: str) -> None:
        """Replace `model` by one with random weights of `kind`."""
        self.model = None
        torch.cuda.empty_cache()
        self.model = chat.chat_model(self.size, torch.float16, self.device)
        if kind != "none":
            quantization.quantise(self.model.llama_model, kind, self.device)

    @torch.no_grad()
    def speed(self, kind: str) -> dict:
        """Return a row: tokens a second of an answer, compared with `generate` and the limit of memory bandwidth.

        Raises NotEqual if recorded steps give other logits than plain ones.
        """
        self.draw(kind)
        self.copy_rate = self.copy_rate or max(counted.copies(self.device, 2**30, 10))
        error = self._recorded_error()
        if not (self.args.rehearsal or error <= TOLERANCE):
            raise NotEqual(
                f"recorded steps differ from plain ones by {error:.1e}: no speed is shown"
            )
        turn = chat.start(self.model)
        turn.chat.ask("What is this?".ljust(PROMPT, "x"), turn.conv)
        start = time.perf_counter()
        turn.answer(max_new_tokens=2, min_length=4)
        first = time.perf_counter() - start
        engine, generate = chat.tokens_a_second(turn, 3, TOKENS, not self.args.rehearsal)
        # a token reads all weights except the embedding table, and the KV cache, here as it is halfway through the answer
        llm, config = self.model.llama_model, self.model.llama_model.config
        tensors = [
            *llm.parameters(),
            *(buffer for name, buffer in llm.named_buffers() if name.endswith("scale")),
        ]
        nbytes = sum(tensor.nbytes for tensor in tensors) - llm.get_input_embeddings().weight.nbytes
        nbytes += 2 * config.num_hidden_layers * config.hidden_size * 2 * (PROMPT + TOKENS // 2)
        found = row(
            f"{self.size} {KINDS[kind]}: tokens a second",
            "1/s",
            engine,
            stock=generate,
            limit=self.copy_rate / nbytes,
            more_is_better=True,
        )
        figures = {
            "recorded steps differ by": error,
            "first answer s": first,
            "recorded": turn.chat.decoder.static,
        }
        return {
            "rows": [found],
            "TB/s": self.copy_rate / 1e12,
            "GiB": torch.cuda.memory_allocated() / 2**30,
            **figures,
        }

    def _recorded_error(self) -> float:
        """Return the relative difference between the logits of a recorded and of a plain step."""
        llm, logits = self.model.llama_model, []
        embeds = llm.get_input_embeddings()(torch.arange(16, device=self.device)[None])
        positions = torch.arange(16, device=self.device)[None]
        for static in (True, False):
            decoder = Decoder(llm, static=static)
            past = decoder.new_past()
            decoder.prefill(past, embeds, positions, None)
            with decoder.steps(past, 1, 20) as step:
                for place, token in enumerate((7, 11, 13), start=positions.shape[1]):
                    tokens = torch.full((1,), token, device=self.device)
                    after = step(tokens, torch.full((1, 1), place, device=self.device), None)
                logits.append(after.float().clone())
        return ((logits[0] - logits[1]).norm() / logits[1].norm()).item()

    @torch.no_grad()
    def prompts(self) -> dict:
        """Return the milliseconds of a prefill the first time that its length occurs, and later; without and with cuDNN."""
        decoder, found = Decoder(self.model.llama_model, static=False), {}
        embedding = self.model.llama_model.get_input_embeddings()
        for cudnn in (False,) if self.args.rehearsal else (False, True):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            for length in LENGTHS:
                embeds, times = embedding(torch.arange(length, device=self.device)[None]), []
                for _ in range(4):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    decoder.prefill(
                        decoder.new_past(),
                        embeds,
                        torch.arange(length, device=self.device)[None],
                        None,
                    )
                    torch.cuda.synchronize()
                    times.append((time.perf_counter() - start) * 1e3)
                found[f"{length}{', cuDNN' * cudnn}"] = {
                    "first": times[0],
                    "then": median(times[1:]),
                }
        torch.backends.cuda.enable_cudnn_sdp(False)
        rows = [
            row(f"{self.size} fp16: prompt of {n} tokens", "ms", [found[str(n)]["then"]])
            for n in LENGTHS
        ]
        return {"rows": rows, "ms": found}

    def threads(self) -> dict:
        """Sample answers in one thread while another records steps; raise RuntimeError if the first one fails."""
        turn, ended, errors = chat.start(self.model), threading.Event(), []
        turn.chat.ask("What is this?", turn.conv)

        def draw() -> None:
            try:
                while not ended.is_set():
                    turn.chat.answer(turn.conv.copy(), turn.images, max_new_tokens=4, min_length=6)
            except Exception as error:
                errors.append(first_line(error))

        turn.chat.decoder.static = False
        other = threading.Thread(target=draw)
        other.start()
        try:
            self._recorded_error()
        finally:
            ended.set()
            other.join()
        if errors:
            raise RuntimeError(f"the other thread ended: {errors[0]}")
        return {}
