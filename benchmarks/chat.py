"""Time to the first token of later turns, and tokens a second, of the chat engine on an LLM of random weights.

The same weights, dialogues and process for all ways, which take turns: the engine with its prefix cache, the engine
without (every turn reads its whole prompt again, as in 2023), and `generate` of transformers. No speed is printed
unless all give the same greedy answers. Where there is a GPU: tokens a second at 7B, beside what its memory allows.
"""

import copy
import time
from statistics import median

from benchmarks import gpu_decode, machine

HELP = "first token of the second and fifth turn, tokens a second; beside full prefill and generate"
GATES = {2: 4.0, 5: 8.0, "tokens": 1.0}  # turn -> at least this many times faster; tokens a second
HISTORY = {2: 257, 5: 773}  # positions before the question of the turn
SIZES = {  # name -> LLM, rounds, tokens of an answer whose speed is measured
    "full": (
        {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16},
        7,
        48,
    ),
    "quick": ({"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}, 2, 8),
}
NUM_QUERIES, VOCABULARY, QUESTION, SEED = 32, 32_000, 12, 0


def add_arguments(parser):
    parser.add_argument("--quick", action="store_true", help="a tiny LLM and two rounds: does it run? (no gates)")
    parser.add_argument("--rounds", type=int, help="of each way, alternating (default: 7)")
    parser.add_argument("--turns", type=int, choices=HISTORY, default=max(HISTORY), help="last one (default: 5)")


def run(args):
    """Measure, print the table, return the figures."""
    import torch

    size = "quick" if args.quick else "full"
    shape, rounds, length = SIZES[size]
    torch.manual_seed(SEED)
    model = RandomModel(shape)
    turns = play(model, args.turns)
    first = first_tokens(model, turns, args.rounds or rounds)
    speed = tokens_a_second(model, turns[2], args.rounds or rounds, length)
    ratios = {turn: median(times["full prefill"]) / median(times["prefix cache"]) for turn, times in first.items()}
    ratios["tokens"] = median(speed["engine"]) / median(speed["generate"])
    passed = args.quick or all(ratio >= GATES[key] for key, ratio in ratios.items())
    print_table(shape, first, speed, ratios, passed, args.quick)
    figures = {
        "size": size,
        "seed": SEED,
        "first_token_s": first,
        "tokens_per_s": speed,
        "ratio": ratios,
        "passed": passed,
        **machine.description("transformers"),
    }
    if torch.cuda.is_available():
        figures["gpu"] = gpu_decode.run(RandomModel, args.quick)
    return figures


class RandomModel:
    """What Chat asks of a model: an LLM of random weights, and a tokenizer that reads back what it writes."""

    def __init__(self, shape, dtype=None, device="cpu"):
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        self.device = torch.device(device)
        self.llama_tokenizer = character_tokenizer()
        config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=2048, **shape)
        config.bos_token_id, config.eos_token_id = self.llama_tokenizer.convert_tokens_to_ids(
            ["<|im_start|>", "<|im_end|>"]
        )
        attention = "eager" if self.device.type == "cpu" else "sdpa"  # as language_model.load_llm
        options = {"dtype": dtype or torch.float32, "attn_implementation": attention}
        with self.device:
            self.llama_model = AutoModelForCausalLM.from_config(config, **options).eval()

    def encode_img(self, images):
        """Return a fixed random embedding for each image."""
        import torch

        width = self.llama_model.config.hidden_size
        embeds = torch.randn(len(images), NUM_QUERIES, width, generator=torch.Generator().manual_seed(SEED)) * 0.02
        return embeds.to(self.device, self.llama_model.dtype), None

    def decoder(self):
        from minigpt4.models.llm.decoding import Decoder

        return Decoder(self.llama_model)


def character_tokenizer():
    """Return a tokenizer with a token for each of 32,000 characters and each word of the template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<|im_start|>", "<|im_end|>", "user", "assistant", "<Img>", "</Img>"]
    characters = [*map(chr, range(32, 127)), "\n", *map(chr, range(0x3400, 0x4DC0)), *map(chr, range(0x4E00, 0xA000))]
    characters += map(chr, range(0xAC00, 0xAC00 + VOCABULARY - len(characters) - len(words)))
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(characters)}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words[2:]])
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words[:2]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=words[0], eos_token=words[1])


def question(turn, length=QUESTION):
    return f"{turn}: what is this? ".ljust(length, "x")[:length]


def play(model, last):
    """Return {turn: (chat, conversation with its question, images, cache before it)} of a dialogue, up to a turn.

    Its answers are as long as makes the histories those of HISTORY. Raises RuntimeError if the answers with a prefix
    cache differ from those without.
    """
    from minigpt4.conversation.chat import Chat, PrefixCache
    from minigpt4.conversation.conversation import CHATML, Conversation

    chat, cache, turns = Chat(model, None), PrefixCache(), {}
    conv, images = Conversation(CHATML), []
    images.append(model.encode_img([None])[0])
    conv.append_image()
    frame = len(positions(chat, asked(chat, conv, ""), images))  # of a turn without question and answer
    later = asked(chat, asked(chat, conv, ""), "")
    a_turn = len(positions(chat, later, images)) - frame + QUESTION
    answer = (HISTORY[5] - HISTORY[2]) // 3 - a_turn
    for turn in range(1, last + 1):
        length = HISTORY[2] - frame - answer if turn == 1 else QUESTION
        chat.ask(question(turn, length), conv)
        turns[turn] = chat, conv.copy(), images, keep(cache, images)
        if turn == last:
            break
        options = {"temperature": 0, "max_new_tokens": answer, "min_length": answer + 2}
        plain = chat.answer(conv.copy(), images, **options)[1]
        if not (chat.answer(conv, images, cache=cache, **options)[1] == plain).all() or len(plain) != answer:
            raise RuntimeError(f"turn {turn}: the prefix cache changes the answer; no speed is shown")
        if HISTORY.get(turn + 1, held := len(positions(chat, conv, images))) != held:
            raise RuntimeError(f"turn {turn + 1} begins after {held} positions, not {HISTORY[turn + 1]}")
    return turns


def asked(chat, conv, text):
    """Return a copy with a question of `text` and an empty answer."""
    conv = conv.copy()
    conv.append_question(text)
    conv.append_message(conv.roles[1], "")
    return conv


def positions(chat, conv, images):
    from minigpt4.text.segments import positions_of

    return positions_of(chat.encoder.encode(conv.segments()), images)


def keep(cache, images):
    """Return a copy of a cache for the same images."""
    return copy.deepcopy(cache, {id(image): image for image in images})


def first_tokens(model, turns, rounds):
    """Return {turn: {way: [seconds to the first token]}}; each way leads every other round."""
    ways = ("prefix cache", "full prefill")
    seconds = {turn: {way: [] for way in ways} for turn in HISTORY if turn in turns}
    for number in range(rounds + 1):
        for turn in seconds:
            chat, conv, images, cache = turns[turn]
            found = set()
            for way in ways if number % 2 else ways[::-1]:
                own = keep(cache, images) if way == "prefix cache" else None
                start = time.perf_counter()
                _, ids = chat.answer(conv.copy(), images, cache=own, temperature=0, max_new_tokens=1, min_length=3)
                seconds[turn][way].append(time.perf_counter() - start)
                found.add(tuple(ids.tolist()))
            if len(found) > 1:
                raise RuntimeError(f"turn {turn}: the first tokens differ; no speed is shown")
    # the first round warms allocators up
    return {turn: {way: values[1:] for way, values in by_way.items()} for turn, by_way in seconds.items()}


def tokens_a_second(model, turn, rounds, length):
    """Return {way: [tokens a second after the first one]} of the engine and of transformers' generate."""
    import torch

    chat, conv, images, _ = turn
    opened = conv.copy()
    opened.append_message(conv.roles[1], None)
    embeds = chat.get_context_emb(opened, images)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)

    def engine(count):
        options = {"temperature": 0, "max_new_tokens": count, "min_length": count + 2}
        return chat.answer(conv.copy(), images, **options)[1].tolist()

    def generate(count):
        options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
        return model.llama_model.generate(inputs_embeds=embeds, attention_mask=mask, **options)[0].tolist()

    ways, speeds = {"engine": engine, "generate": generate}, {"engine": [], "generate": []}
    for number in range(rounds + 1):
        answers = []
        for name in ways if number % 2 else list(ways)[::-1]:
            times = [time.perf_counter()]
            for count in (1, length):
                answers.append(ways[name](count)[-count:])
                times.append(time.perf_counter())
            speeds[name].append((length - 1) / (times[2] - times[1] - (times[1] - times[0])))
        if answers[0] != answers[2] or answers[1] != answers[3]:
            raise RuntimeError("the engine and generate write different answers; no speed is shown")
    return {name: values[1:] for name, values in speeds.items()}


def print_table(shape, first, speed, ratios, passed, quick):
    def cell(values, factor, digits):
        low, middle, high = (f"{factor * value:.{digits}f}" for value in (min(values), median(values), max(values)))
        return f"{middle} [{low} .. {high}]"

    rounds = len(speed["engine"])
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    print(f"Llama of random weights, {width} wide, {layers} layers, float32, CPU; median of {rounds} [min .. max]")
    print(f"{'':<44}{'ours':>28}{'the other way':>28}{'faster':>10}{'at least':>10}")
    for turn, times in first.items():
        ours, other = (cell(times[way], 1e3, 1) for way in ("prefix cache", "full prefill"))
        label = f"turn {turn}, {HISTORY[turn]} positions before: first token, ms"
        print(f"{label:<44}{ours:>28}{other:>28}{ratios[turn]:>9.2f}x{GATES[turn]:>9.1f}x")
    ours, other = (cell(speed[way], 1, 1) for way in ("engine", "generate"))
    print(f"{'tokens/s, beside generate':<44}{ours:>28}{other:>28}{ratios['tokens']:>9.2f}x{GATES['tokens']:>9.1f}x")
    print("equal answers: yes" + ("" if quick else f"; {'PASS' if passed else 'FAIL'}"))
