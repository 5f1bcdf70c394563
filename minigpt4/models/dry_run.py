"""What can be said of a model before its weights are loaded: what is wrong, parts, texts, memory."""

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
    """The part of MiniGPTBase that `--dry-run` and inspect ask."""

    @classmethod
    def preflight(cls, cfg: MiniGPT4Config, where: str = "model") -> list[Problem]:
        """Return the problems of the section and of its files, by their first bytes; nothing is loaded."""
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
        """See BaseModel: `compile` and `cuda_graphs`. A vision side that trains and a divided LLM are compiled on
        demand alone, what trains or is computed again is not recorded.
        """
        is_usual = modes(cfg)["vision"] == "frozen" and not shard_llm
        if cfg.compile is None and device.type == "cuda" and is_usual:
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
            can = is_usual and not recording_problems(cfg, "model")
            cfg.cuda_graphs = device.type == "cuda" and bool(cfg.compile) and can

    @classmethod
    def skeleton(cls, cfg: MiniGPT4Config, compute_dtype: torch.dtype) -> "DryRun":
        """Return the model on the meta device, as `from_config` would make it: shapes and types, no weights."""
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
        """Return the parts that `from_config` would build on `device`, once its files fit; see `read_files`.

        `num_shares`: into how many the LLM is divided; its `bytes` are those of one.
        """
        device = torch.device(device)
        quantization.check_device(
            quantization.kind_of(cfg.llm_quantization, cfg.low_resource), device
        )
        model = cls.skeleton(cfg, resolve_compute_dtype(cfg.llm_precision, device))
        model.read_files(cfg)
        sizes = (
            {}
            if num_shares == 1
            else {"llama_model": sharding.share_bytes(model.llama_model, num_shares)}
        )
        return [
            part._replace(device=str(device), bytes=sizes.get(part.name, part.bytes))
            for part in model.parts()
        ]

    def read_files(self, cfg: MiniGPT4Config) -> None:
        """Read into a skeleton what `from_config` will read, but for the LLM's weights: names and shapes must fit.

        Files that are still to be downloaded are left out; of large ones little more than the header is read. Raises
        CheckpointError, ValueError; warns of an end symbol that would not be learnt.
        """
        self.text_preview(cfg)
        self.llm_identity = language_model.identity(cfg.llama_model, self.llama_model)
        if cfg.ckpt and (path := cached_path(cfg.ckpt)).is_file():
            checkpoint_folder.compared(self.load_ckpt(path), path, cfg, self.identity())

    @classmethod
    def text_preview(cls, cfg: MiniGPT4Config) -> TextPreview:
        """Return the TextPreview of a checked `model` section: what the LLM reads and learns; loads the tokenizer."""
        cls.settle(cfg)
        return TextPreview(
            cfg, language_model.load_tokenizer(cfg.llama_model), cls.image_tokens(cfg)
        )

    @classmethod
    def training_memory(
        cls,
        cfg: MiniGPT4Config,
        device: torch.device | str,
        batch_size: int,
        max_tokens: int | None = None,
        num_shares: int = 1,
    ) -> int:
        """Return the bytes that a training step of `batch_size` texts of full length holds at most, counted.

        `num_shares`: into how many the LLM is divided; then counted is one of them, and what a step gathers.
        """
        peak = memory.count(cls, cfg, torch.device(device), batch_size, max_tokens).peak
        if num_shares == 1:
            return peak
        llm = cls.skeleton(
            cfg, resolve_compute_dtype(cfg.llm_precision, torch.device(device))
        ).llama_model
        return (
            peak
            - sharding.share_bytes(llm, 1)
            + sharding.share_bytes(llm, num_shares)
            + sharding.gathered_bytes(llm)
        )
