"""The stock alternative of today: transformers' Blip2ForConditionalGeneration with the same weights and LLM."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration

from minigpt4.text.rows import IGNORED, IMAGE_ID

NAMES = {  # {part of a parameter's name in our ViT: the same in Blip2VisionModel}
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks.": "encoder.layers.",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    ".norm": ".layer_norm",
}


def blip2(model: nn.Module) -> nn.Module:
    """Return transformers' BLIP-2, which shares all weights with `model` except for a copy of the fused QKV biases."""
    vit, bert = model.visual_encoder, model.Qformer.bert
    text = model.llama_model.config
    attention, mlp = vit.blocks[0].attn, vit.blocks[0].mlp
    vision = {
        "hidden_size": vit.embed_dim,
        "intermediate_size": mlp.fc1.out_features,
        "num_hidden_layers": len(vit.blocks),
        "num_attention_heads": attention.num_heads,
        "image_size": model.image_size,
        "patch_size": vit.patch_embed.patch_size[0],
        "qkv_bias": True,
    }
    config = Blip2Config(
        vision_config=vision,
        qformer_config=bert.config.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=model.query_tokens.shape[1],
        image_token_index=text.vocab_size - 1,  # occurs in no text of a workload
    )
    with torch.device("meta"):
        stock = Blip2ForConditionalGeneration(config)
    stock.qformer, stock.language_model = bert, model.llama_model
    stock.language_projection, stock.query_tokens = model.llama_proj, model.query_tokens
    stock.vision_model.load_state_dict(vision_weights(model), assign=True)
    stock.vision_model.post_layernorm.eps = model.ln_vision.eps
    stock.vision_model.requires_grad_(False)
    return stock.eval()


def vision_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of ViT and `ln_vision` under their names in Blip2VisionModel."""
    tensors = {
        f"post_layernorm.{name}": tensor for name, tensor in model.ln_vision.named_parameters()
    }
    for name, tensor in model.visual_encoder.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        tensors[name] = tensor
    for number, block in enumerate(model.visual_encoder.blocks):
        q, v = (tensors.pop(f"encoder.layers.{number}.attn.{part}_bias") for part in "qv")
        tensors[f"encoder.layers.{number}.self_attn.qkv.bias"] = torch.cat(
            [q, block.attn.k_bias.to(q), v]
        )
    return {name: tensor.detach() for name, tensor in tensors.items()}


def loss(stock: nn.Module, model: nn.Module, samples: dict) -> Tensor:
    """Return the loss of `stock` (from `blip2`) for a batch of `model`; its gradient reaches model.llama_proj."""
    inputs = batch_of(stock, model, samples)
    with stock_attention(model.llama_model), model.maybe_autocast():
        return stock(pixel_values=samples["image"], **inputs, use_cache=False).loss


@contextmanager
def stock_attention(llm: nn.Module) -> Iterator[None]:
    """Let an LLM use transformers' default attention inside the block."""
    usual, llm.config._attn_implementation = llm.config._attn_implementation, "sdpa"
    try:
        yield
    finally:
        llm.config._attn_implementation = usual


def batch_of(stock: nn.Module, model: nn.Module, samples: dict) -> dict[str, Tensor]:
    """Return {"input_ids", "attention_mask", "labels"} [B, L], padded on the right as a collator would do."""
    image = stock.config.image_token_index
    columns = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in model.rows(samples):
        columns["input_ids"].append(
            torch.tensor([image if index == IMAGE_ID else index for index in row.ids])
        )
        columns["labels"].append(torch.tensor(row.labels))
        columns["attention_mask"].append(torch.ones_like(columns["labels"][-1]))
    fills = {"input_ids": 1, "attention_mask": 0, "labels": IGNORED}
    padded = {
        name: nn.utils.rnn.pad_sequence(columns[name], True, fill) for name, fill in fills.items()
    }
    return {name: tensor.to(model.device) for name, tensor in padded.items()}
