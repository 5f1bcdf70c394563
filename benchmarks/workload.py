"""What training is measured on: models of random weights in several sizes, and batches of the stages' lengths."""

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory

SEED = 0
# name -> (LLM width, MLP, layers, heads, key heads, vocabulary; ViT width, depth, heads, MLP; Q-Former width, layers,
# heads, MLP; image, queries)
SIZES = {
    "tiny": ((64, 96, 2, 4, 2, 120), (32, 1, 2, 64), (64, 1, 2, 64), 56, 8),
    "toy": ((512, 1376, 8, 8, 8, 1000), (192, 6, 6, 768), (256, 4, 8, 1024), 112, 32),  # the head's share is that of 7B
    "embedded": ((576, 1536, 30, 9, 3, 49152), (192, 6, 6, 768), (256, 4, 8, 1024), 112, 16),
    "slice": ((4096, 11008, 2, 32, 32, 2000), (192, 6, 6, 768), (256, 4, 8, 1024), 112, 32),  # two layers of 7B
    "7b-thin": ((4096, 11008, 4, 32, 32, 32000), (1408, 4, 16, 6144), (768, 2, 12, 3072), 224, 32),  # an eighth of 7b
    "7b": ((4096, 11008, 32, 32, 32, 32000), (1408, 39, 16, 6144), (768, 12, 12, 3072), 224, 32),
    "13b": ((5120, 13824, 40, 40, 40, 32000), (1408, 39, 16, 6144), (768, 12, 12, 3072), 224, 32),
}
STAGES = {1: (16, 5, 4, 32), 2: (105, 25, 60, 160)}  # tokens of a text: mean, deviation, least, most
PROMPT_TOKENS = {1: None, 2: (7, 18)}  # before and behind the image


def model_config(size, folder):
    """Return the `model` section of a size; its LLM's config.json and the sidecars are written to `folder`."""
    from omegaconf import OmegaConf
    from transformers import LlamaConfig

    from minigpt4.models import MiniGPT4

    llm, vit, qformer, image_size, num_queries = SIZES[size]
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    shape = dict(zip((*names, "vocab_size"), llm, strict=True))
    LlamaConfig(**shape, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1).save_pretrained(folder)
    vit_names = ("embed_dim", "depth", "num_heads", "mlp_dim")
    qformer_names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    sidecars = {
        "vit": dict(zip(vit_names, vit, strict=True)) | {"patch_size": 14},
        "q": dict(zip(qformer_names, qformer, strict=True)) | {"cross_attention_frequency": 2, "encoder_width": vit[0]},
    }
    for stem, values in sidecars.items():
        (Path(folder) / f"{stem}.json").write_text(json.dumps(values))
    section = {
        "vit_ckpt": str(Path(folder) / "vit.safetensors"),
        "q_former_model": str(Path(folder) / "q.safetensors"),
        "llama_model": str(folder),
        "image_size": image_size,
        "num_query_token": num_queries,
        "max_txt_len": 160,
    }
    return OmegaConf.merge(OmegaConf.structured(MiniGPT4.Config), section)


def random_model(size, dtype, device="cpu", stage=1):
    """Return a MiniGPT4 of random weights in training mode, with a tokenizer of one token a character."""
    import torch
    from transformers import AutoModelForCausalLM

    from minigpt4.models import MiniGPT4, memory
    from minigpt4.models.llm import language_model

    torch.manual_seed(SEED)
    with TemporaryDirectory() as folder:
        cfg = model_config(size, folder)
        model = MiniGPT4(cfg, dtype).to_empty(device=device)
        options = language_model.attention_options(torch.device(device))
        with torch.device(device):
            llm = AutoModelForCausalLM.from_config(language_model.load_config(folder), dtype=dtype, **options).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        is_norm_weight = tensor.ndim == 1 and name.endswith("weight")
        tensor.data.fill_(1.0) if is_norm_weight else tensor.data.normal_(0, 0.02)
    for block in model.visual_encoder.blocks:
        block.attn.k_bias.zero_()
    model._attach(llm, device)
    model.llama_tokenizer = memory.tokenizer_of_characters()
    use_stage(model, stage)
    return model.train()


def use_stage(model, stage):
    """Give the model the prompt of a stage."""
    from minigpt4.text.rows import IMAGE_SLOT

    counts = PROMPT_TOKENS[stage]
    model.prompt_list = [f"{'a' * counts[0]}{IMAGE_SLOT}{'b' * counts[1]}"] if counts else []


def in_float32(model):
    """Return a copy that computes in float32 with the same weights."""
    import torch

    tokenizer, model.llama_tokenizer = model.llama_tokenizer, None
    wide = copy.deepcopy(model).float()
    model.llama_tokenizer = wide.llama_tokenizer = tokenizer
    wide.compute_dtype = torch.float32
    return wide


def batches(model, stage, batch_size, number, seed=SEED):
    """Return `number` batches of random images and of texts whose lengths are drawn as those of a stage."""
    import torch

    draw, generator = _draw(stage, seed), torch.Generator().manual_seed(seed)
    found = []
    for step in range(number):
        image = torch.randn(batch_size, 3, model.image_size, model.image_size, generator=generator)
        found.append({"image": image.to(model.device), "text_input": texts(stage, batch_size, draw), "iters": step})
    return found


def texts(stage, batch_size, draw=None):
    """Return a batch's texts: random letters, of lengths drawn as those of a stage; `draw`: a generator of NumPy."""
    draw, (mean, deviation, least, most) = draw or _draw(stage, SEED), STAGES[stage]
    lengths = draw.normal(mean, deviation, batch_size).round().clip(least, most).astype(int)
    return ["".join(chr(c) for c in draw.integers(97, 123, length - 1)) for length in lengths]  # and end_sym


def _draw(stage, seed):
    import numpy as np

    return np.random.default_rng([seed, stage])


def useful_flops(model, samples):
    """Return the FLOPs that a training step cannot do without: texts without padding, logits where a target is.

    The LLM's layers forward and backward to their inputs, attention of what is seen alone, the head where something is
    predicted, ViT and Q-Former forward. What all texts begin with is counted for each of them.
    """
    import torch

    llm = model.llama_model.config
    rows = model.rows(samples)
    lengths = [len(row.ids) - 1 for row in rows]  # the last token predicts nothing
    num_targets = sum(row.num_targets for row in rows)
    layers = sum(p.numel() for p in model.llama_model.model.layers.parameters() if p.ndim == 2)
    head_dim = model.llama_model.model.layers[0].self_attn.head_dim
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    attention = 12 * pairs * llm.num_attention_heads * head_dim * llm.num_hidden_layers
    projection = 4 * len(rows) * model.query_tokens.shape[1] * model.llama_proj.weight.numel()
    with torch.no_grad():
        vision = count_flops(lambda: model.encode_img(samples["image"])) - projection // 2
    head = 4 * num_targets * llm.hidden_size * llm.vocab_size
    return 4 * layers * sum(lengths) + attention + head + projection + vision


def count_flops(run):
    """Return the FLOPs of the matrix products that `run()` executes."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    in_place = lambda out, a, b, *args, **options: 2 * a[0] * a[1] * b[1]  # noqa: E731 (not known to the counter)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        run()
    return counter.get_total_flops()
