"""Time to the first token of later turns, and tokens a second, of the chat engine on an LLM of random weights.

The same weights, dialogues and process for all ways, which take turns: the engine with its prefix cache, the engine
without (every turn reads its whole prompt again, as in 2023), and `generate` of transformers. No speed is printed
unless all give the same greedy answers. Where there is a GPU: tokens a second at 7B, beside what its memory allows.
"""

import copy
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from benchmarks import limits, workload
from benchmarks.harness import NotEqual, row, take_turns
from minigpt4.conversation.chat import Chat, PrefixCache
from minigpt4.conversation.conversation import CHATML, Conversation
from minigpt4.models import MiniGPT4
from minigpt4.models.llm.quantization import quantise

HELP = "first token of the second and fifth turn, tokens a second; beside full prefill and generate"
GATES = {2: 4.0, 5: 8.0}  # turn -> at least this many times faster
HISTORY = {2: 257, 5: 773}  # positions before the question of the turn
FIRST_QUESTION, QUESTION, ANSWER = 61, 12, 150  # tokens that make the histories as long as that
GPU_QUESTION, GPU_TOKENS = 200, 128
FULL, QUICK = ("chat", 7, 48), ("chat-quick", 2, 8)  # size, rounds, tokens of an answer whose speed is measured
OPTIONS = {
    "--quick": {"action": "store_true", "help": "a tiny LLM and two rounds: does it run? (no gates)"},
    "--rounds": {"type": int, "help": "of each way, alternating (default: 7)"},
    "--turns": {"type": int, "choices": list(HISTORY), "default": max(HISTORY), "help": "last one (default: 5)"},
}
# what a dialogue is before a turn's answer: engine, conversation with the question, images, cache
Turn = tuple[Chat, Conversation, list, PrefixCache]


def run(args: Namespace) -> dict:
    """Measure; return the rows. Raises NotEqual where the ways answer differently."""
    size, rounds, length = QUICK if args.quick else FULL
    rounds = args.rounds or rounds
    model = chat_model(size, torch.float32)
    turns, rows = play(model, args.turns), []
    for turn, seconds in first_tokens({turn: turns[turn] for turn in HISTORY if turn in turns}, rounds).items():
        name = f"chat: first token of turn {turn}, {HISTORY[turn]} positions before"
        rows.append(row(name, "s", *seconds, at_least=None if args.quick else GATES[turn]))
    engine, generate = tokens_a_second(model, turns[2], rounds, length)
    rows.append(row("chat: tokens a second", "1/s", engine, stock=generate))
    print("equal answers: yes")
    if torch.cuda.is_available():
        rows += on_gpu(args.quick)
    return {"rows": rows, "size": size}


def chat_model(size: str, dtype: torch.dtype, device: str = "cpu") -> MiniGPT4:
    """Return a model of random weights whose tokenizer reads back what it writes."""
    model = workload.random_model(size, dtype, device).eval()
    model.llama_tokenizer = tokenizer = character_tokenizer(model.llama_model.config.vocab_size)
    for config in (model.llama_model.config, model.llama_model.generation_config):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return model


def character_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each of many characters and each word of the template."""
    words = ["<|im_start|>", "<|im_end|>", "user", "assistant", "<Img>", "</Img>"]
    characters = [*map(chr, range(32, 127)), "\n", *map(chr, range(0x3400, 0x4DC0)), *map(chr, range(0x4E00, 0xA000))]
    characters += map(chr, range(0xAC00, 0xAC00 + vocabulary - len(characters) - len(words)))
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(characters)}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words[2:]])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words[:2]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=words[0], eos_token=words[1])


def play(model: MiniGPT4, last: int) -> dict[int, Turn]:
    """Return {turn: Turn} of a dialogue up to a turn. Raises NotEqual if a prefix cache changes its answers."""
    cache, turns, (chat, conv, images) = PrefixCache(), {}, start(model)
    options = {"temperature": 0, "max_new_tokens": ANSWER, "min_length": ANSWER + 2}
    for turn in range(1, last + 1):
        if turn in HISTORY and (held := chat.get_context_emb(conv, images).shape[1]) != HISTORY[turn]:
            raise RuntimeError(f"turn {turn} begins after {held} positions, not {HISTORY[turn]}")
        length = FIRST_QUESTION if turn == 1 else QUESTION
        chat.ask(f"{turn}: what is this? ".ljust(length, "x")[:length], conv)
        turns[turn] = chat, conv.copy(), images, keep(cache, images)
        if turn == last:
            break
        plain = chat.answer(conv.copy(), images, **options)[1]
        if not (chat.answer(conv, images, cache=cache, **options)[1] == plain).all() or len(plain) != ANSWER:
            raise NotEqual(f"the prefix cache changes the answer of turn {turn}")
    return turns


def start(model: MiniGPT4) -> tuple[Chat, Conversation, list]:
    """Return an engine, a conversation that begins with an image, and the image's embeddings."""
    conv, image = Conversation(CHATML), torch.zeros(1, 3, model.image_size, model.image_size, device=model.device)
    conv.append_image()
    with torch.no_grad(), model.maybe_autocast():
        return Chat(model, None), conv, [workload.image_embeds(model, image)]


def keep(cache: PrefixCache, images: list) -> PrefixCache:
    """Return a copy of a cache for the same images."""
    return copy.deepcopy(cache, {id(image): image for image in images})


def first_tokens(turns: dict[int, Turn], rounds: int) -> dict[int, tuple[list[float], list[float]]]:
    """Return {turn: (seconds to the first token with the prefix cache, without)}."""
    seconds = {}
    for turn, (chat, conv, images, cache) in turns.items():

        def first(is_cached, chat=chat, conv=conv, images=images, cache=cache):
            own = keep(cache, images) if is_cached else None
            start = time.perf_counter()
            _, ids = chat.answer(conv.copy(), images, cache=own, temperature=0, max_new_tokens=1, min_length=3)
            return time.perf_counter() - start, ids.tolist()

        # the first round warms allocators up
        results = take_turns({"cache": partial(first, True), "full": partial(first, False)}, rounds, warm_up=1)
        if [ids for _, ids in results["cache"]] != [ids for _, ids in results["full"]]:
            raise NotEqual(f"the first tokens of turn {turn} differ")
        seconds[turn] = tuple([value for value, _ in results[way]] for way in ("cache", "full"))
    return seconds


def tokens_a_second(model: MiniGPT4, turn: Turn, rounds: int, length: int) -> tuple[list[float], list[float]]:
    """Return tokens a second after the first one, of the engine and of transformers' generate."""
    chat, conv, images, _ = turn
    opened = conv.copy()
    opened.append_message(conv.roles[1], None)
    embeds = chat.get_context_emb(opened, images)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)

    def engine(count):
        options = {"temperature": 0, "max_new_tokens": count, "min_length": count + 2}
        return chat.answer(conv.copy(), images, **options)[1].tolist()[-count:]

    def generate(count):
        options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
        return model.llama_model.generate(inputs_embeds=embeds, attention_mask=mask, **options)[0].tolist()[-count:]

    ways = {"engine": partial(speed, engine, length), "generate": partial(speed, generate, length)}
    results = take_turns(ways, rounds, warm_up=1)
    is_exact = model.llama_model.dtype == torch.float32  # half precision may decide a tie otherwise
    if is_exact and [text for _, text in results["engine"]] != [text for _, text in results["generate"]]:
        raise NotEqual("the engine and generate write different answers")
    return tuple([value for value, _ in results[way]] for way in ways)


def speed(write: Callable[[int], object], length: int) -> tuple[float, list]:
    """Return tokens a second of `write(count)` behind the first token, and what it wrote of 1 and `length` tokens."""
    times, answers = [time.perf_counter()], []
    for count in (1, length):
        answers.append(write(count))
        times.append(time.perf_counter())
    return (length - 1) / (times[2] - times[1] - (times[1] - times[0])), answers


def on_gpu(is_quick: bool) -> list[dict]:
    """Return rows of tokens a second of a 7B LLM on a GPU for kinds of weights.

    The limit: every token reads all weights but the embedding table, and the keys and values so far, at the rate at
    which this GPU copies memory in this run.
    """
    size, device, rows = "chat-quick" if is_quick else "7b", torch.device("cuda"), []
    copied = max(limits.copies(device, 2**30, 10))
    for kind in ("none", "int8", "int4"):
        model = chat_model(size, torch.float16, device)
        if kind != "none":
            quantise(model.llama_model, kind, device)
        chat, conv, images = start(model)
        chat.ask("What is this?".ljust(GPU_QUESTION, "x"), conv)
        engine, generate = tokens_a_second(model, (chat, conv, images, PrefixCache()), 5, GPU_TOKENS)
        # the weights but the embedding table, and the keys and values
        llm, config = model.llama_model, model.llama_model.config
        tensors = [*llm.parameters(), *(buffer for name, buffer in llm.named_buffers() if name.endswith("scale"))]
        read = sum(tensor.nbytes for tensor in tensors) - llm.get_input_embeddings().weight.nbytes
        read += 2 * config.num_hidden_layers * config.hidden_size * 2 * (GPU_QUESTION + GPU_TOKENS // 2)
        name = f"{size} {kind if kind != 'none' else 'fp16'}: tokens a second"
        rows.append(row(name, "1/s", engine, stock=generate, limit=copied / read, more_is_better=True))
        print(f"{name}: {torch.cuda.memory_allocated() / 2**30:.1f} GiB of this GPU in use")
        del model, llm, tensors, chat, images
        torch.cuda.empty_cache()
    return rows
