"""Tiny folders of random weights and drawn squares, laid out as the downloads of docs/recipes.md.

python -m tests.open_small FOLDER
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
)

COLOURS = ("red", "green", "blue", "white", "black", "yellow")
NUM_IMAGES = 24
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The form of Qwen 3's template: an empty thought stands before the last answer alone, and behind the prompt if asked.
THOUGHT = "<think>\\n\\n</think>\\n\\n"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    f"{{% if loop.last and m.role == 'assistant' %}}{{{{ '{THOUGHT}' }}}}{{% endif %}}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    f"{{% if enable_thinking is defined and enable_thinking is false %}}{{{{ '{THOUGHT}' }}}}{{% endif %}}{{% endif %}}"
)


def write_open_small(root):
    """Write all that the files open_small_*.yaml name below `root`, the folder `env.cache_root`."""
    home = Path(root) / "open_small"
    write_siglip(home / "siglip2-base-patch16-384")
    write_qwen3(home / "Qwen3-0.6B")
    captions = [("Render a clear summary of the photo.\n<image>", "a {} square on grey")]
    write_llava(
        home / "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        home / "LLaVA-Pretrain/images",
        "00000/",
        captions,
    )
    dialogue = [("<image>\nWhat is shown?", "A {} square."), ("Which colour is it?", "It is {}.")]
    instructions = home / "LLaVA-Instruct-150K/llava_instruct_150k.json"
    write_llava(instructions, home / "coco/train2017", "", dialogue)


def write_siglip(folder):
    """Write a SigLIP of both sides, as the fixed sizes of SigLIP 2 are published."""
    torch.manual_seed(0)
    sides = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    text = sides | {"num_hidden_layers": 1, "vocab_size": 9, "max_position_embeddings": 8}
    config = SiglipConfig(
        text_config=text, vision_config=sides | {"image_size": 32, "patch_size": 8}
    )
    SiglipModel(config).save_pretrained(folder)
    settings = {
        "image_processor_type": "SiglipImageProcessor",
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(
        json.dumps(settings | {"size": {"height": 32, "width": 32}})
    )


def write_qwen3(folder):
    """Write a Qwen 3 whose tied head stands in the file once more, and whose tokenizer has fewer words than it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens(["<think>", "</think>"])
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(1)
    ids = dict(
        zip(
            ("bos_token_id", "eos_token_id"),
            fast.convert_tokens_to_ids(list(SPECIAL[::2])),
            strict=True,
        )
    )
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
    }
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 300}
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, **ids)).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def write_llava(path, images, prefix, turns):
    """Write LLaVA's annotations and their images, in `images` below `prefix`; {} in an answer is the colour."""
    (images / prefix).mkdir(parents=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(NUM_IMAGES):
        colour, name = COLOURS[index % len(COLOURS)], f"{prefix}{index:012d}.jpg"
        image = Image.new("RGB", (48, 40), "grey")
        image.paste(Image.new("RGB", (16, 16), colour), (index, 8))
        image.save(images / name)
        spoken = []
        for question, answer in turns:
            spoken += [
                {"from": "human", "value": question},
                {"from": "gpt", "value": answer.format(colour)},
            ]
        records.append({"id": name[:-4], "image": name, "conversations": spoken})
    path.write_text(json.dumps(records))


if __name__ == "__main__":
    write_open_small(sys.argv[1])
