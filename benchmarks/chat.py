"""Time to the first token of later turns, and tokens a second, of the chat engine on an LLM of random weights.

All ways alternate in one process, with the same weights and dialogues: the engine with its prefix cache, the engine
without (every turn prefills its whole prompt again, as in 2023), and transformers' `generate`. No speed is printed unless
all give the same greedy answers. On a GPU: `benchmarks gpu --part answers`.
"""

import copy
import time
from argparse import Namespace
from functools import partial
from typing import NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from benchmarks import workload
from benchmarks.harness import QUICK, ROUNDS, NotEqual, row, take_turns
from minigpt4.conversation.chat import Chat, PrefixCache
from minigpt4.conversation.conversation import CHATML, Conversation
from minigpt4.models import MiniGPT4

HELP = "first token of the second and fifth turn, tokens a second; beside full prefill and generate"
GATES = {2: 4.0, 5: 8.0}  # {turn: how many times faster the first token has to come}
HISTORY = {2: 257, 5: 773}  # {turn: positions before its question}
# Lengths in tokens. With a first question of FIRST_QUESTION tokens they give the histories above.
FIRST_QUESTION = 61
QUESTION = 12
ANSWER = 150
FULL, SHORT = (7, 48), (2, 8)  # rounds, tokens of the answer whose speed is measured
OPTIONS = {
    "--quick": QUICK | {"help": "a tiny LLM and two rounds, to see that it runs; no gates"},
    "--rounds": ROUNDS | {"default": None, "help": "runs of each way (default: 7)"},
    "--turns": {
        "type": int,
        "choices": list(HISTORY),
        "default": max(HISTORY),
        "help": "last one (default: 5)",
    },
}


def run(args: Namespace) -> dict:
    """Measure; return the rows. Raises NotEqual where the ways answer differently."""
    size, (rounds, length) = ("chat-quick", SHORT) if args.quick else ("chat", FULL)
    rounds = args.rounds or rounds
    turns, rows = play(chat_model(size, torch.float32), args.turns), []
    for number in [number for number in HISTORY if number in turns]:
        gate = None if args.quick else GATES[number]
        name = f"chat: first token of turn {number}, {HISTORY[number]} positions before"
        rows.append(row(name, "s", *first_token(turns[number], rounds), at_least=gate))
    engine, generate = tokens_a_second(turns[2], rounds, length)
    rows.append(row("chat: tokens a second", "1/s", engine, stock=generate))
    print("equal answers: yes")
    return {"rows": rows, "size": size}


def chat_model(size: str, dtype: torch.dtype, device: str = "cpu") -> MiniGPT4:
    """Return a model of random weights, with a tokenizer that encodes decoded text to the same ids."""
    model = workload.random_model(size, dtype, device).eval()
    model.llama_tokenizer = tokenizer = character_tokenizer(model.llama_model.config.vocab_size)
    for config in (model.llama_model.config, model.llama_model.generation_config):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return model


def character_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `vocabulary` tokens: many single characters, and the words of the template."""
    words = ["<|im_start|>", "<|im_end|>", "user", "assistant", "<Img>", "</Img>"]
    characters = [
        *map(chr, range(32, 127)),
        "\n",
        *map(chr, range(0x3400, 0x4DC0)),
        *map(chr, range(0x4E00, 0xA000)),
    ]
    characters += map(chr, range(0xAC00, 0xAC00 + vocabulary - len(characters) - len(words)))
    tokenizer = Tokenizer(
        models.BPE({character: index for index, character in enumerate(characters)}, [])
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words[2:]])
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word in words[:2]]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=words[0], eos_token=words[1]
    )


class Turn(NamedTuple):
    """A dialogue before a turn's answer: engine, conversation up to the question, images, prefix cache so far."""

    chat: Chat
    conv: Conversation
    images: list
    cache: PrefixCache

    def answer(self, cache: PrefixCache | None = None, **options) -> list[int]:
        """Return the token ids of the greedy answer; the conversation stays as it is."""
        conv = self.conv.copy()
        _, ids = self.chat.answer(conv, self.images, cache=cache, temperature=0, **options)
        return ids.tolist()


def play(model: MiniGPT4, last: int) -> dict[int, Turn]:
    """Return {turn: Turn} of a dialogue of `last` turns. Raises NotEqual if the prefix cache changes an answer."""
    dialogue, turns = start(model), {}
    chat, conv = dialogue.chat, dialogue.conv
    for number in range(1, last + 1):
        held = chat.get_context_emb(conv, dialogue.images).shape[1]
        if held != HISTORY.get(number, held):
            raise RuntimeError(
                f"turn {number} begins after {held} positions, not {HISTORY[number]}"
            )
        length = FIRST_QUESTION if number == 1 else QUESTION
        chat.ask(f"{number}: what is this? ".ljust(length, "x")[:length], conv)
        turns[number] = turn = dialogue._replace(
            conv=conv.copy(), cache=keep(dialogue.cache, dialogue.images)
        )
        if number < last:
            options = {"temperature": 0, "max_new_tokens": ANSWER, "min_length": ANSWER + 2}
            ids = chat.answer(conv, dialogue.images, cache=dialogue.cache, **options)[1].tolist()
            uncached = turn.answer(max_new_tokens=ANSWER, min_length=ANSWER + 2)
            if uncached != ids or len(ids) != ANSWER:
                raise NotEqual(f"the prefix cache changes the answer of turn {number}")
    return turns


def start(model: MiniGPT4) -> Turn:
    """Return a new dialogue with one image and no question yet."""
    conv = Conversation(CHATML)
    image = torch.zeros(1, 3, model.image_size, model.image_size, device=model.device)
    conv.append_image()
    with torch.no_grad(), model.maybe_autocast():
        return Turn(Chat(model, None), conv, [workload.image_embeds(model, image)], PrefixCache())


def keep(cache: PrefixCache, images: list) -> PrefixCache:
    """Return a copy of a cache that shares `images` with it: the cache recognises them by identity."""
    return copy.deepcopy(cache, {id(image): image for image in images})


def first_token(turn: Turn, rounds: int) -> tuple[list[float], list[float]]:
    """Return seconds to the first token with and without prefix cache, by round. Raises NotEqual where the tokens differ."""
    tokens = set()

    def seconds_to_first(is_cached):
        cache = keep(turn.cache, turn.images) if is_cached else None
        start = time.perf_counter()
        ids = turn.answer(cache, max_new_tokens=1, min_length=3)
        seconds = time.perf_counter() - start
        tokens.add(tuple(ids))
        return seconds

    ways = {"cache": partial(seconds_to_first, True), "full": partial(seconds_to_first, False)}
    results = take_turns(ways, rounds, warm_up=1)
    if len(tokens) != 1:
        raise NotEqual("the first tokens differ")
    return results["cache"], results["full"]


def tokens_a_second(
    turn: Turn, rounds: int, length: int, has_values: bool = True
) -> tuple[list[float], list[float] | None]:
    """Return tokens a second, the first token aside, of the engine and of `generate`. Raises NotEqual if answers differ.

    `has_values`: False where nothing is really computed, as in a rehearsal; `generate` would not end there and gives None.
    """
    llm, opened = turn.chat.model.llama_model, turn.conv.copy()
    answers = {1: set(), length: set()}  # {number of tokens: the different answers}
    opened.append_message(opened.roles[1], None)
    embeds = turn.chat.get_context_emb(opened, turn.images)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)

    def engine(count):
        return turn.answer(max_new_tokens=count, min_length=count + 2)

    def generate(count):
        options = {
            "do_sample": False,
            "max_new_tokens": count,
            "min_new_tokens": count,
            "pad_token_id": 0,
        }
        return llm.generate(inputs_embeds=embeds, attention_mask=mask, **options)[0].tolist()

    def speed(write):
        seconds = {}
        for count in (1, length):
            start = time.perf_counter()
            answers[count].add(tuple(write(count)[-count:]))
            seconds[count] = time.perf_counter() - start
        return (length - 1) / (seconds[length] - seconds[1])

    ways = {"engine": partial(speed, engine)}
    if has_values:
        ways["generate"] = partial(speed, generate)
    results = take_turns(ways, rounds, warm_up=1)
    # in half precision, rounding may decide differently between nearly equal logits
    if llm.dtype == torch.float32 and max(map(len, answers.values())) > 1:
        raise NotEqual("the engine and generate write different answers")
    return results["engine"], results.get("generate")
