"""What the measurements run on: models of random weights in several sizes, and batches with text lengths as in each stage.

The last section gathers all access to the model beyond its public methods.
"""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from minigpt4.common.cuda_graphs import Recorder
from minigpt4.models import MiniGPT4, MiniGPTv2, memory
from minigpt4.models.llm import backends, language_model
from minigpt4.models.memory import without_values
from minigpt4.text.rows import IGNORED as IGNORED
from minigpt4.text.segments import IMAGE_SLOT

SEED = 0
# {name: (LLM width, MLP width, layers, heads, key-value heads, vocabulary; ViT width, depth, heads, MLP width;
# Q-Former width, layers, heads, MLP width; image size, queries)}
SIZES = {
    "chat-quick": ((128, 256, 2, 4, 4, 32000), (32, 1, 2, 64), (64, 1, 2, 64), 56, 32),
    "chat": ((1024, 2816, 8, 16, 16, 32000), (32, 1, 2, 64), (64, 1, 2, 64), 56, 32),
    "tiny": ((64, 96, 2, 4, 2, 120), (32, 1, 2, 64), (64, 1, 2, 64), 56, 8),
    # the output layer has the same share of the FLOPs as in 7B
    "toy": ((512, 1376, 8, 8, 8, 1000), (192, 6, 6, 768), (256, 4, 8, 1024), 112, 32),
    "embedded": ((576, 1536, 30, 9, 3, 49152), (192, 6, 6, 768), (256, 4, 8, 1024), 112, 16),
    # two layers of 7B
    "slice": ((4096, 11008, 2, 32, 32, 2000), (192, 6, 6, 768), (256, 4, 8, 1024), 112, 32),
    # an eighth of 7b
    "7b-thin": ((4096, 11008, 4, 32, 32, 32000), (1408, 4, 16, 6144), (768, 2, 12, 3072), 224, 32),
    "7b": ((4096, 11008, 32, 32, 32, 32000), (1408, 39, 16, 6144), (768, 12, 12, 3072), 224, 32),
    "13b": ((5120, 13824, 40, 40, 40, 32000), (1408, 39, 16, 6144), (768, 12, 12, 3072), 224, 32),
}
# tokens of a stage's texts: mean, standard deviation, least, most
STAGES = {1: (16, 5, 4, 32), 2: (105, 25, 60, 160)}
PROMPT_TOKENS = {1: None, 2: (7, 18)}  # before and after the image
OFFICIAL_BATCH = {1: 64, 2: 12}  # batch size in the stage's shipped YAML
# MiniGPT-v2's finetuning: the largest batch size of a dataset, max_txt_len
V2_BATCH = 6
V2_TOKENS = 1024
LLM_NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
VIT_NAMES = ("embed_dim", "depth", "num_heads", "mlp_dim")
QFORMER_NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def model_config(size: str, folder: str | Path) -> DictConfig:
    """Return the `model` section of a size; write the dimensions of its LLM, ViT and Q-Former to `folder`."""
    llm, vit, qformer, image_size, num_queries = SIZES[size]
    shape = dict(zip((*LLM_NAMES, "vocab_size"), llm, strict=True))
    LlamaConfig(
        **shape, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1
    ).save_pretrained(folder)
    bert = dict(zip(QFORMER_NAMES, qformer, strict=True)) | {
        "cross_attention_frequency": 2,
        "encoder_width": vit[0],
    }
    dimensions = {"vit": dict(zip(VIT_NAMES, vit, strict=True)) | {"patch_size": 14}, "q": bert}
    for stem, values in dimensions.items():
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


def random_model(
    size: str, dtype: torch.dtype, device: str | torch.device = "cpu", stage: int = 1
) -> MiniGPT4:
    """Return a MiniGPT4 of random weights in training mode, with the prompt of `stage`; each character is a token."""
    torch.manual_seed(SEED)
    with TemporaryDirectory() as folder:
        cfg = model_config(size, folder)
        model = MiniGPT4(cfg, dtype).to_empty(device=device)
        options = language_model.attention_options(torch.device(device))
        with torch.device(device):
            llm = AutoModelForCausalLM.from_config(
                language_model.load_config(folder), dtype=dtype, **options
            ).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        is_norm_weight = tensor.ndim == 1 and name.endswith("weight")
        tensor.data.fill_(1.0) if is_norm_weight else tensor.data.normal_(0, 0.02)
    for block in model.visual_encoder.blocks:
        block.attn.k_bias.zero_()
    model.attach_language(llm, device)
    model.llama_tokenizer = memory.tokenizer_of_characters()
    use_stage(model, stage)
    return model.train()


def meta_model(
    size: str,
    stage: int,
    batch_size: int,
    kind: str = "none",
    checkpointing: bool = False,
    prompt: tuple | None = None,
) -> tuple[MiniGPT4, dict]:
    """Return a float16 model on the meta device with the prompt of a stage, and a batch of texts without images.

    `kind`: quantization of the LLM. `prompt`: numbers of tokens (before, after) the image, in place of the stage's.
    """
    with TemporaryDirectory() as folder:
        cfg = model_config(size, folder)
        cfg.llm_quantization, cfg.llm_checkpointing = kind, checkpointing
        cfg.max_txt_len = STAGES[stage][3]
        model = MiniGPT4.skeleton(cfg, torch.float16).train()
    model.llama_tokenizer = memory.tokenizer_of_characters()
    use_stage(model, stage, prompt)
    return model, {"text_input": texts(stage, batch_size)}


def meta_model_v2(kind: str = "none", checkpointing: bool = False) -> MiniGPTv2:
    """Return MiniGPT-v2 with LoRA on the 7B LLM as in its YAML, in float16 on the meta device; see `meta_model`."""
    with TemporaryDirectory() as folder:
        files = {key: model_config("7b", folder)[key] for key in ("vit_ckpt", "llama_model")}
        cfg = OmegaConf.merge(OmegaConf.structured(MiniGPTv2.Config), files)
        cfg.llm_quantization, cfg.llm_checkpointing, cfg.max_txt_len = (
            kind,
            checkpointing,
            V2_TOKENS,
        )
        model = MiniGPTv2.skeleton(cfg, torch.float16).train()
    model.llama_tokenizer = memory.tokenizer_of_characters()
    return model


@contextmanager
def without_weights(size: str, stage: int) -> Iterator[tuple[MiniGPT4, dict]]:
    """Give a model and a batch of the stage's official size inside the block, of tensors without values."""
    batch_size = OFFICIAL_BATCH[stage]
    model, batch = meta_model(size, stage, batch_size)
    with without_values(model):
        image = torch.empty(batch_size, 3, model.image_size, model.image_size)
        yield model, batch | {"image": image}


def in_float32(model: MiniGPT4) -> MiniGPT4:
    """Return a copy that computes in float32 with the same weights."""
    tokenizer, model.llama_tokenizer = model.llama_tokenizer, None
    wide = copy.deepcopy(model).float()
    model.llama_tokenizer = wide.llama_tokenizer = tokenizer
    wide.compute_dtype = torch.float32
    return wide


def in_float64(model: MiniGPT4) -> MiniGPT4:
    """Return a copy that computes in float64 with the same weights; `ln_vision` stays in float32, as in any model."""
    exact = in_float32(model).double()
    exact.ln_vision.float()
    exact.compute_dtype = torch.float64
    return exact


def batches(
    model: MiniGPT4, stage: int, batch_size: int, number: int, seed: int = SEED
) -> list[dict]:
    """Return `number` batches of random images and random texts, with lengths as in a stage, on the model's device."""
    draw, generator = _draw(stage, seed), torch.Generator().manual_seed(seed)
    drawn = []
    for step in range(number):
        image = torch.randn(batch_size, 3, model.image_size, model.image_size, generator=generator)
        drawn.append(
            {
                "image": image.to(model.device),
                "text_input": texts(stage, batch_size, draw),
                "iters": step,
            }
        )
    return drawn


def texts(stage: int, batch_size: int, draw: np.random.Generator | None = None) -> list[str]:
    """Return a batch's texts: random letters, with lengths as in a stage, less one token for the end symbol."""
    mean, deviation, least, most = STAGES[stage]
    draw = draw or _draw(stage, SEED)
    lengths = draw.normal(mean, deviation, batch_size).round().clip(least, most).astype(int)
    return ["".join(map(chr, draw.integers(97, 123, length - 1))) for length in lengths]


def _draw(stage, seed):
    return np.random.default_rng([seed, stage])


def useful_flops(model: MiniGPT4, samples: dict) -> int:
    """Return the FLOPs that a training step cannot do without: no padding, and logits at targets only.

    Counted: the LLM's layers forward and backward to their inputs, causal attention, the output layer at targets, ViT and
    Q-Former forward. A prefix that all texts share is counted for each of them.
    """
    llm, rows = model.llama_model.config, model.rows(samples)
    num_queries = model.query_tokens.shape[1]
    num_tokens = lengths(model, samples)
    num_targets = sum(row.num_targets for row in rows)
    # forward and backward to the inputs: 4 FLOPs a weight and token
    layers = sum(p.numel() for p in model.llama_model.model.layers.parameters() if p.ndim == 2)
    head_dim = model.llama_model.model.layers[0].self_attn.head_dim
    pairs = sum(length * (length + 1) // 2 for length in num_tokens)
    attention = 12 * pairs * llm.num_attention_heads * head_dim * llm.num_hidden_layers
    head = 4 * num_targets * llm.hidden_size * llm.vocab_size
    # the projection trains: forward and its own gradient
    projection = 4 * len(rows) * num_queries * model.llama_proj.weight.numel()
    # image_embeds runs the projection's forward pass, which is counted above already
    with torch.no_grad():
        vision = count_flops(lambda: image_embeds(model, samples["image"])) - projection // 2
    return 4 * layers * sum(num_tokens) + attention + head + projection + vision


def count_flops(run: Callable[[], object]) -> int:
    """Return the FLOPs of the matrix products that `run()` executes."""

    def flops_of_addmm_(out, a, b, *args, **options):  # shapes; torch's counter lacks this one
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.addmm_: flops_of_addmm_}
    ) as counter:
        run()
    return counter.get_total_flops()


# ---------------------------------------- access to the model beyond its public methods


def lengths(model: MiniGPT4, samples: dict) -> list[int]:
    """Return the number of positions of each sample that the LLM has to read: all but the last, which predicts nothing."""
    return [len(row.ids) - 1 for row in model.rows(samples)]


def llm_inputs(model: MiniGPT4, samples: dict) -> dict:
    """Return {"inputs_embeds" [B, L, D], "attention_mask", "labels" [B, L]} of texts padded to the longest."""
    return model.build_inputs(samples)[0]


def image_embeds(model: MiniGPT4, image: Tensor) -> Tensor:
    """Return what the LLM reads of images [B, 3, S, S]: [B, Q, D]."""
    return model.encode_images(image)


@contextmanager
def given_images(model: MiniGPT4, embeds: Tensor) -> Iterator[None]:
    """Let the model use `embeds` [B, Q, D] as its image features inside the block."""
    model.encode_images = lambda image: embeds
    try:
        yield
    finally:
        del model.encode_images


def use_stage(model: MiniGPT4, stage: int, prompt: tuple[int, int] | None = None) -> None:
    """Give the model a prompt as long as the stage's, or, where it has one, `prompt`: tokens before and after the image."""
    counts = PROMPT_TOKENS[stage] and (prompt or PROMPT_TOKENS[stage])
    model.prompt_list = [f"{'a' * counts[0]}{IMAGE_SLOT}{'b' * counts[1]}"] if counts else []


def use_path(model: MiniGPT4, path: str) -> None:
    """Let the model run its LLM by `path`: "padded", "packed", "lean", "compiled" or "recorded".

    recorded: compiled, with steps recorded as CUDA graphs in `model.kept_recorder`.
    """
    is_recorded = path == "recorded"
    model.llm_backend = "compiled" if is_recorded else path
    model.kept_recorder = getattr(model, "kept_recorder", None) or Recorder()
    model.recorder = model.kept_recorder if is_recorded else None


def chosen_path(model: MiniGPT4, may_compile: bool = False) -> str:
    """Return the path that a training run would choose for the model's LLM."""
    with model.maybe_autocast():
        return backends.choose(model.llama_model, may_compile=may_compile)
