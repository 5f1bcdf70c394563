"""What training is measured on: models of random weights in several sizes, and batches of the stages' lengths.

What the measurements need of the model beyond its public methods is gathered in the last section.
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
# name -> (LLM width, MLP, layers, heads, key heads, vocabulary; ViT width, depth, heads, MLP; Q-Former width, layers,
# heads, MLP; image, queries)
SIZES = {
    "chat-quick": ((128, 256, 2, 4, 4, 32000), (32, 1, 2, 64), (64, 1, 2, 64), 56, 32),
    "chat": ((1024, 2816, 8, 16, 16, 32000), (32, 1, 2, 64), (64, 1, 2, 64), 56, 32),
    "tiny": ((64, 96, 2, 4, 2, 120), (32, 1, 2, 64), (64, 1, 2, 64), 56, 8),
    # the head's share is that of 7B
    "toy": ((512, 1376, 8, 8, 8, 1000), (192, 6, 6, 768), (256, 4, 8, 1024), 112, 32),
    "embedded": ((576, 1536, 30, 9, 3, 49152), (192, 6, 6, 768), (256, 4, 8, 1024), 112, 16),
    # two layers of 7B
    "slice": ((4096, 11008, 2, 32, 32, 2000), (192, 6, 6, 768), (256, 4, 8, 1024), 112, 32),
    # an eighth of 7b
    "7b-thin": ((4096, 11008, 4, 32, 32, 32000), (1408, 4, 16, 6144), (768, 2, 12, 3072), 224, 32),
    "7b": ((4096, 11008, 32, 32, 32, 32000), (1408, 39, 16, 6144), (768, 12, 12, 3072), 224, 32),
    "13b": ((5120, 13824, 40, 40, 40, 32000), (1408, 39, 16, 6144), (768, 12, 12, 3072), 224, 32),
}
# tokens of a text: mean, deviation, least, most
STAGES = {1: (16, 5, 4, 32), 2: (105, 25, 60, 160)}
PROMPT_TOKENS = {1: None, 2: (7, 18)}  # before and behind the image
OFFICIAL_BATCH = {1: 64, 2: 12}  # of the configurations of the stages
# of MiniGPT-v2's finetuning: the largest batch of a dataset, max_txt_len
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
    """Return the `model` section of a size; its LLM's config.json and the sidecars are written to `folder`."""
    llm, vit, qformer, image_size, num_queries = SIZES[size]
    shape = dict(zip((*LLM_NAMES, "vocab_size"), llm, strict=True))
    LlamaConfig(
        **shape, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1
    ).save_pretrained(folder)
    bert = dict(zip(QFORMER_NAMES, qformer, strict=True)) | {
        "cross_attention_frequency": 2,
        "encoder_width": vit[0],
    }
    sidecars = {"vit": dict(zip(VIT_NAMES, vit, strict=True)) | {"patch_size": 14}, "q": bert}
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


def random_model(
    size: str, dtype: torch.dtype, device: str | torch.device = "cpu", stage: int = 1
) -> MiniGPT4:
    """Return a MiniGPT4 of random weights in training mode, with a tokenizer of one token a character."""
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

    `kind`: of the LLM's weights. `prompt`: token counts (before, behind) the image in place of the stage's.
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
    """Return MiniGPT-v2 on the 7B with LoRA, in float16 on the meta device, as its YAML file has it; see meta_model."""
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
    """Give a model and its stage's official batch, of tensors without values (see without_values), inside the block."""
    batch_size = OFFICIAL_BATCH[stage]
    model, batch = meta_model(size, stage, batch_size)
    with without_values(model):
        yield (
            model,
            batch | {"image": torch.empty(batch_size, 3, model.image_size, model.image_size)},
        )


def in_float32(model: MiniGPT4) -> MiniGPT4:
    """Return a copy that computes in float32 with the same weights."""
    tokenizer, model.llama_tokenizer = model.llama_tokenizer, None
    wide = copy.deepcopy(model).float()
    model.llama_tokenizer = wide.llama_tokenizer = tokenizer
    wide.compute_dtype = torch.float32
    return wide


def in_float64(model: MiniGPT4) -> MiniGPT4:
    """Return a copy that computes in float64 with the same weights, but for norms that are float32 in any model."""
    exact = in_float32(model).double()
    exact.ln_vision.float()
    exact.compute_dtype = torch.float64
    return exact


def batches(
    model: MiniGPT4, stage: int, batch_size: int, number: int, seed: int = SEED
) -> list[dict]:
    """Return `number` batches of random images and of texts whose lengths are drawn as those of a stage."""
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
    """Return a batch's texts: random letters, of lengths drawn as those of a stage, less one for the end symbol."""
    mean, deviation, least, most = STAGES[stage]
    draw = draw or _draw(stage, SEED)
    lengths = draw.normal(mean, deviation, batch_size).round().clip(least, most).astype(int)
    return ["".join(map(chr, draw.integers(97, 123, length - 1))) for length in lengths]


def _draw(stage, seed):
    return np.random.default_rng([seed, stage])


def useful_flops(model: MiniGPT4, samples: dict) -> int:
    """Return the FLOPs that a training step cannot do without: texts without padding, logits where a target is.

    The LLM's layers forward and backward to their inputs, attention of what is seen alone, the head where something is
    predicted, ViT and Q-Former forward. What all texts begin with is counted for each of them.
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
    with torch.no_grad():
        vision = count_flops(lambda: image_embeds(model, samples["image"])) - projection // 2
    return 4 * layers * sum(num_tokens) + attention + head + projection + vision


def count_flops(run: Callable[[], object]) -> int:
    """Return the FLOPs of the matrix products that `run()` executes."""
    in_place = lambda out, a, b, *args, **options: 2 * a[0] * a[1] * b[1]  # noqa: E731 (not known to the counter)
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.addmm_: in_place}
    ) as counter:
        run()
    return counter.get_total_flops()


# ---------------------------------------- what only the model's own code knows


def lengths(model: MiniGPT4, samples: dict) -> list[int]:
    """Return how many positions of each sample predict something: all but the last."""
    return [len(row.ids) - 1 for row in model.rows(samples)]


def llm_inputs(model: MiniGPT4, samples: dict) -> dict:
    """Return {"inputs_embeds" [B, L, D], "attention_mask", "labels" [B, L]} of texts padded to the longest."""
    return model.build_inputs(samples)[0]


def image_embeds(model: MiniGPT4, image: Tensor) -> Tensor:
    """Return what the LLM reads of images [B, 3, S, S]: [B, Q, D]."""
    return model.encode_images(image)


@contextmanager
def given_images(model: MiniGPT4, embeds: Tensor) -> Iterator[None]:
    """Let the model take `embeds` [B, Q, D] for its images inside the block."""
    model.encode_images = lambda image: embeds
    try:
        yield
    finally:
        del model.encode_images


def use_stage(model: MiniGPT4, stage: int, prompt: tuple[int, int] | None = None) -> None:
    """Give the model the prompt of a stage; with `prompt`, one of as many tokens before and behind the image."""
    counts = PROMPT_TOKENS[stage] and (prompt or PROMPT_TOKENS[stage])
    model.prompt_list = [f"{'a' * counts[0]}{IMAGE_SLOT}{'b' * counts[1]}"] if counts else []


def use_path(model: MiniGPT4, path: str) -> None:
    """Let the model run its LLM as `path` ("padded", "packed", "lean", "compiled" or "recorded") says.

    recorded: compiled, its steps as CUDA graphs, which `model.kept_recorder` keeps.
    """
    is_recorded = path == "recorded"
    model.llm_backend = "compiled" if is_recorded else path
    model.kept_recorder = getattr(model, "kept_recorder", None) or Recorder()
    model.recorder = model.kept_recorder if is_recorded else None


def chosen_path(model: MiniGPT4, may_compile: bool = False) -> str:
    """Return the path that a training run would choose for the model's LLM."""
    with model.maybe_autocast():
        return backends.choose(model.llama_model, may_compile=may_compile)
