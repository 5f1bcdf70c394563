"""The language side of a MiniGPT: the tokenizer, the LLM with its LoRA, and the projection in front of it."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minigpt4.common.dist_utils import main_print
from minigpt4.common.startup import startup
from minigpt4.models import projector
from minigpt4.models.llm import adapters, chat_format, language_model, quantization
from minigpt4.models.mini_gpt4_config import MiniGPT4Config
from minigpt4.text.encoder import PromptEncoder

if TYPE_CHECKING:  # it imports transformers, which takes seconds
    from minigpt4.models.llm.decoding import Decoder


class LanguageSide:
    """The part of MiniGPTBase that loads the LLM and the projection."""

    @classmethod
    def settle(cls, cfg: MiniGPT4Config) -> None:
        """Fill in the keys whose values come from the model's files: the image size and the prompt template."""
        super().settle(cfg)
        chat_format.settle(cfg)

    @startup.phase("LLM")
    def load_language(
        self, cfg: MiniGPT4Config, device: torch.device, shard_llm: bool = False
    ) -> None:
        """Load the tokenizer and the LLM, and create the projection into the LLM's embedding space."""
        main_print("Loading LLAMA")
        self.llama_tokenizer = language_model.load_tokenizer(cfg.llama_model)
        kind = quantization.kind_of(cfg.llm_quantization, cfg.low_resource)
        options = {"gpu": cfg.device_8bit, "device_map": cfg.device_map, "shard": shard_llm}
        llm = language_model.load_llm(cfg.llama_model, self.llm_dtype, device, kind, **options)
        if cfg.check_llm:
            language_model.check_reads_english(llm, self.llama_tokenizer, cfg.llama_model)
        self.attach_language(llm, device)
        self.llm_identity = language_model.identity(cfg.llama_model, llm)
        main_print("Loading LLAMA Done")

    @property
    def llm_dtype(self) -> torch.dtype:
        """The type of the LLM's weights: float32 if they train, as small updates are lost in half precision."""
        return torch.float32 if self.train_modes["llm"] == "full" else self.compute_dtype

    def attach_language(self, llm: nn.Module, device: torch.device | str) -> None:
        """Set the LLM, freeze it or add LoRA as configured, and create the projection into its embedding space."""
        self.llama_model = llm
        if torch.device(device).type == "cuda":
            # cuDNN's attention builds a new plan for each sequence length: 25 ms and more
            torch.backends.cuda.enable_cudnn_sdp(False)
        if self.train_modes["llm"] != "full":
            self.freeze("llama_model")
        if self.lora_r:
            adapters.add_lora(llm, self.lora_r, self.lora_alpha)
            main_print(adapters.parameter_summary(llm))
        width = llm.get_input_embeddings().weight.shape[1]
        self.llama_proj = projector.build(self.projector, self.vision_width, width, device)
        if self.train_modes["projector"] == "frozen":
            self.freeze("llama_proj")

    def train(self, mode: bool = True) -> "LanguageSide":
        """Set training mode; the LLM stays in evaluation mode (no dropout) even if it trains, only LoRA switches."""
        super().train(mode)
        if hasattr(self, "llama_model"):
            self.llama_model.eval()
            if self.lora_r:
                adapters.train(self.llama_model, mode)
        return self

    def decoder(self) -> "Decoder":
        """Return a Decoder, which runs the LLM for a chat."""
        from minigpt4.models.llm.decoding import Decoder

        return Decoder(self.llama_model)

    @property
    def encoder(self) -> PromptEncoder:
        """The PromptEncoder of `llama_tokenizer`, made anew if the tokenizer was replaced."""
        if self._encoder is None or self._encoder.tokenizer is not self.llama_tokenizer:
            self._encoder = PromptEncoder(self.llama_tokenizer)
        return self._encoder

    def composition(self) -> dict[str, Any]:
        """Return the parts that the model consists of, as plain text: {"vision", "bridge", "projector", "llm"}.

        `vision`: a name of VIT_MODELS or timm, or the model_type of a transformers folder; `bridge`: qformer, merged
        or none; `projector`: linear or mlp2x_gelu; `llm`: the model_type of the LLM's folder, with its sizes.
        """
        config = self.llama_model.config.get_text_config()
        width = self.llama_model.get_input_embeddings().weight.shape[1]
        sizes = f"{config.num_hidden_layers} layers, width {width}, vocabulary {config.vocab_size}"
        return {
            **self.vision_composition(),
            "projector": self.projector,
            "llm": f"{config.model_type}: {sizes}",
        }
