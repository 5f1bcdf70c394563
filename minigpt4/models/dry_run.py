"""Everything that is known of a model before its weights are loaded: problems, parts, text preview, memory."""

import logging

import torch

from minigpt4.common import compiling
from minigpt4.common.config import Problem
from minigpt4.common.utils import cached_path
from minigpt4.models import checkpoint_folder, memory
from minigpt4.models.base_model import Part, resolve_compute_dtype
from minigpt4.models.llm import language_model, quantization, sharding
from minigpt4.models.mini_gpt4_config import (
    MiniGPT4Config,
    find_problems,
    recording_problems,
)
from minigpt4.models.training_parts import modes
from minigpt4.text.preview import TextPreview


class DryRun:
    """The part of MiniGPTBase that `--dry-run` and `inspect` use."""

    @classmethod
    def preflight(cls, cfg: MiniGPT4Config, where: str = "model") -> list[Problem]:
        """Return the problems of the section and of its files, judged by their first bytes; loads nothing."""
        return find_problems(cfg, where)

    @classmethod
    def refusal_to_shard(cls, cfg: MiniGPT4Config) -> str | None:
        """See BaseModel."""
        kind = quantization.kind_of(cfg.llm_quantization, cfg.low_resource)
        if cfg.lora_r:
            return f"only a frozen LLM is divided among ranks, and model.lora_r is {cfg.lora_r}; set it to 0"
        if (mode := modes(cfg)["llm"]) != "frozen":
            return f"only a frozen LLM is divided among ranks, and model.train.llm is {mode}"
        if cfg.cuda_graphs:
            return "steps of a divided LLM are not recorded, and model.cuda_graphs is True; set it to False"
        return sharding.refusal(kind)

    @classmethod
    def settle_training(cls, cfg: MiniGPT4Config, device: torch.device, shard_llm: bool) -> None:
        """Set `compile` and `cuda_graphs` where they are None; see BaseModel.

        With a vision side that trains or a sharded LLM both are only used on request; `cuda_graphs` needs `compile`, and
        a section without `recording_problems`.
        """
        is_standard = modes(cfg)["vision"] == "frozen" and not shard_llm
        if cfg.compile is None and device.type == "cuda" and is_standard:
            reason = compiling.obstacle(device)
            cfg.compile = reason is None
            if reason:
                logging.warning(
                    "model.compile: steps take longer here, torch.compile does not work on %s (%s); install a C "
                    "compiler",
                    device,
                    reason,
                )
        if cfg.cuda_graphs is None:
            can_record = is_standard and not recording_problems(cfg, "model")
            cfg.cuda_graphs = device.type == "cuda" and bool(cfg.compile) and can_record

    @classmethod
    def skeleton(cls, cfg: MiniGPT4Config, compute_dtype: torch.dtype) -> "DryRun":
        """Return the model that `from_config` would build, on the meta device: shapes and types, no values."""
        cls.settle(cfg)
        model = cls(cfg, compute_dtype)
        kind = quantization.kind_of(cfg.llm_quantization, cfg.low_resource)
        model.attach_language(
            language_model.meta_llm(cfg.llama_model, model.llm_dtype, kind), "meta"
        )
        return model

    @classmethod
    def plan(
        cls, cfg: MiniGPT4Config, device: torch.device | str, num_shares: int = 1
    ) -> list[Part]:
        """Return the parts that `from_config` would build on `device`. Raises as `read_files` if files do not fit.

        `num_shares`: the number of shards of the LLM, whose `bytes` are then those of one shard.
        """
        device = torch.device(device)
        kind = quantization.kind_of(cfg.llm_quantization, cfg.low_resource)
        quantization.check_device(kind, device)
        model = cls.skeleton(cfg, resolve_compute_dtype(cfg.llm_precision, device))
        model.read_files(cfg)
        parts = [part._replace(device=str(device)) for part in model.parts()]
        if num_shares == 1:
            return parts
        shard_bytes = sharding.share_bytes(model.llama_model, num_shares)
        return [
            part._replace(bytes=shard_bytes) if part.name == "llama_model" else part
            for part in parts
        ]

    def read_files(self, cfg: MiniGPT4Config) -> None:
        """Read into a skeleton the files of `from_config`, except the LLM's weights: names and shapes must fit.

        Files that have yet to be downloaded are left out; of large files little more than the header is read. Raises
        CheckpointError, ValueError; warns of an end symbol that would not be learned.
        """
        # for its errors and warnings alone
        self.text_preview(cfg)
        self.llm_identity = language_model.identity(cfg.llama_model, self.llama_model)
        if cfg.ckpt and (path := cached_path(cfg.ckpt)).is_file():
            checkpoint_folder.compared(self.load_ckpt(path), path, cfg, self.identity())

    @classmethod
    def text_preview(cls, cfg: MiniGPT4Config) -> TextPreview:
        """Return the TextPreview of a checked `model` section: what the LLM reads and learns; loads the tokenizer."""
        cls.settle(cfg)
        tokenizer = language_model.load_tokenizer(cfg.llama_model)
        return TextPreview(cfg, tokenizer, cls.image_tokens(cfg))

    @classmethod
    def training_memory(
        cls,
        cfg: MiniGPT4Config,
        device: torch.device | str,
        batch_size: int,
        max_tokens: int | None = None,
        num_shares: int = 1,
    ) -> int:
        """Return the peak bytes of a training step with `batch_size` texts of full length, as `memory.count` finds.

        `max_tokens`: see there. `num_shares`: the number of shards of the LLM; then the whole LLM is replaced by one
        shard and the parts that a step gathers.
        """
        device = torch.device(device)
        peak = memory.count(cls, cfg, device, batch_size, max_tokens).peak
        if num_shares == 1:
            return peak
        llm = cls.skeleton(cfg, resolve_compute_dtype(cfg.llm_precision, device)).llama_model
        whole, shard = sharding.share_bytes(llm, 1), sharding.share_bytes(llm, num_shares)
        return peak - whole + shard + sharding.gathered_bytes(llm)
