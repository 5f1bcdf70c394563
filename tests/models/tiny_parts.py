"""Tiny model folders with random weights, as transformers writes them: vision towers and LLMs of many families."""

import json
from dataclasses import asdict

import timm
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SmolLM3Config,
)

from minigpt4.models.vision.qformer import QFormerConfig, build_qformer, to_release_name

NUM_QUERIES = 5
SIZE, PATCH, WIDTH = 28, 7, 32  # 16 patches
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
VISION |= {"image_size": SIZE, "patch_size": PATCH}
SIGLIP2 = {key: value for key, value in VISION.items() if key != "image_size"} | {"num_patches": 16}
DINO = {key: value for key, value in VISION.items() if key != "intermediate_size"}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 9,
}
# {name: (configuration of the folder, tokens before the patches)}
TOWERS = {
    "clip": (CLIPVisionConfig(**VISION), 1),
    "clip_with_text": (CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=8), 1),
    "siglip": (SiglipVisionConfig(**VISION), 0),
    "siglip2": (Siglip2VisionConfig(**SIGLIP2), 0),
    "dinov2": (Dinov2Config(**DINO, mlp_ratio=2), 1),
    "dinov2_registers": (Dinov2WithRegistersConfig(**DINO, mlp_ratio=2, num_register_tokens=2), 3),
}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]

HEADS = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "num_hidden_layers": 2,
}
SIZES = {
    **HEADS,
    "intermediate_size": 48,
    "vocab_size": 300,
    "max_position_embeddings": 256,
    "pad_token_id": None,
}
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# {name: (configuration, BOS, end token, special tokens, chat template)}
_QWEN = (None, "<|im_end|>", ["<|im_start|>"], CHATML)
LLMS = {
    "llama2": (LlamaConfig(**SIZES), "<s>", "</s>", [], None),
    "llama3": (
        LlamaConfig(**SIZES, tie_word_embeddings=True),
        *("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"], LLAMA3),
    ),
    "qwen2": (Qwen2Config(**SIZES, tie_word_embeddings=True), *_QWEN),
    "qwen3": (Qwen3Config(**SIZES, head_dim=16), *_QWEN),
    "mistral": (MistralConfig(**SIZES, sliding_window=8), "<s>", "</s>", [], MISTRAL),
    "gemma": (
        GemmaConfig(**SIZES, head_dim=8),
        "<bos>",
        "<eos>",
        ["<start_of_turn>", "<end_of_turn>"],
        GEMMA,
    ),
    "gemma2": (
        Gemma2Config(**SIZES, head_dim=8, sliding_window=8),
        *("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], GEMMA),
    ),
    "gemma3": (
        Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=8),
        *("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], GEMMA),
    ),
    "phi": (PhiConfig(**SIZES), None, "<|endoftext|>", [], None),
    "phi3": (
        Phi3Config(**SIZES, sliding_window=8),
        "<s>",
        "<|endoftext|>",
        ["<|user|>", "<|assistant|>", "<|end|>"],
        PHI3,
    ),
    "smollm": (
        LlamaConfig(**SIZES, tie_word_embeddings=True),
        "<|im_start|>",
        "<|im_end|>",
        [],
        CHATML,
    ),
    "smollm3": (SmolLM3Config(**SIZES, no_rope_layer_interval=2), *_QWEN),
    "gpt_neox": (
        GPTNeoXConfig(
            **{key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
        ),
        *(None, "<|endoftext|>", [], None),
    ),
}


def write_tower(root, name):
    """Write the folder of a vision tower below `root`; return its path as text."""
    torch.manual_seed(0)
    folder, (config, _) = root / name, TOWERS[name]
    AutoModel.from_config(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": MEAN, "image_std": STD})
    )
    return str(folder)


def write_timm(root, name="test_vit"):
    """Write the weight file of a timm model, 64 wide; return its path as text."""
    torch.manual_seed(0)
    path = root / f"{name}.safetensors"
    save_file(timm.create_model(name, pretrained=False).state_dict(), path)
    return str(path)


def write_qformer(root, width):
    """Write the file of a Q-Former for image tokens of `width`, and its sidecar with dimensions; return its path."""
    torch.manual_seed(0)
    config = QFormerConfig(16, 2, 2, 32, 2, width)
    state = {
        f"Qformer.{name}": tensor
        for name, tensor in build_qformer(config, "cpu").state_dict().items()
    }
    state |= {"query_tokens": torch.randn(1, NUM_QUERIES, 16)}
    state |= {"ln_vision.weight": torch.ones(width), "ln_vision.bias": torch.zeros(width)}
    path = root / f"qformer_{width}.safetensors"
    save_file({to_release_name(name): tensor.contiguous() for name, tensor in state.items()}, path)
    path.with_suffix(".json").write_text(json.dumps(asdict(config)))
    return str(path)


def write_llm(root, name):
    """Write the folder of an LLM, with a byte-level tokenizer, below `root`; return its path as text."""
    folder, (config, bos, eos, special, chat_template) = root / name, LLMS[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = [token for token in (bos, eos, *special) if token]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in dict.fromkeys(names)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    torch.manual_seed(1)
    config.bos_token_id, config.eos_token_id = fast.bos_token_id, fast.eos_token_id
    llm = AutoModelForCausalLM.from_config(config)
    # with transformers' initialisation logits would hardly depend on the input, and all biases would be 0
    for parameter in llm.parameters():
        parameter.data += torch.randn_like(parameter) * (0.2 if parameter.ndim > 1 else 0.1)
    llm.save_pretrained(folder)
    return str(folder)
