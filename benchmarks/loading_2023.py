"""MiniGPT4 with its frozen parts loaded as in 2023: initialised at random, then read, copied, converted to half precision."""

from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from minigpt4.common.registry import registry
from minigpt4.common.startup import files_of, startup
from minigpt4.common.utils import resolve_file
from minigpt4.models import MiniGPT4, weights
from minigpt4.models.llm import language_model
from minigpt4.models.vision import eva_vit, qformer


@registry.register_model("mini_gpt4_loaded_as_2023")
class LoadedAs2023(MiniGPT4):
    """Trains as MiniGPT4; only its loading differs. Weights are not quantised."""

    @startup.phase("ViT")
    def load_vit(self, cfg):
        path = resolve_file(cfg.vit_ckpt, "model.vit_ckpt")
        config = weights.dimensions(path, eva_vit.VIT_MODELS[cfg.vit_model], "model.vit_ckpt")
        vit = config.build(self.image_size, device="cpu")
        vit.load_state_dict(in_memory(weights.read_tensors(path, "model.vit_ckpt")), strict=False)
        take(self.visual_encoder, vit)

    @startup.phase("Q-Former")
    def load_qformer(self, cfg):
        path = resolve_file(cfg.q_former_model, "model.q_former_model")
        config = weights.dimensions(path, qformer.QFormerConfig(), "model.q_former_model")
        released = in_memory(weights.read_tensors(path, "model.q_former_model", root="model"))
        tensors = {qformer.from_release_name(name): tensor for name, tensor in released.items()}
        network = qformer.build_qformer(config, device="cpu")
        network.load_state_dict(part_of(tensors, "Qformer."), strict=False)
        take(self.Qformer, network)
        self.ln_vision.load_state_dict(
            {n: t.float() for n, t in part_of(tensors, "ln_vision.").items()}, assign=True
        )
        self.load_state_dict(
            {"query_tokens": tensors["query_tokens"].float()}, strict=False, assign=True
        )

    @startup.phase("LLM")
    def load_language(self, cfg, device):
        self.llama_tokenizer = language_model.load_tokenizer(cfg.llama_model)
        options = {"dtype": self.compute_dtype, **language_model.attention_options(device)}
        llm = AutoModelForCausalLM.from_config(
            language_model.load_config(cfg.llama_model), **options
        )
        for file in files_of([cfg.llama_model]):
            llm.load_state_dict(
                in_memory(weights.read_tensors(file, "model.llama_model")), strict=False
            )
        self.attach_language(llm.to(device).eval(), device)
        self.llm_identity = language_model.identity(cfg.llama_model, llm)


def in_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors copied into memory, as torch.load gave them in 2023; they may be mapped from a file."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, under their names without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def take(planned: nn.Module, built: nn.Module) -> None:
    """Give the module `planned`, which is on the meta device, the values of `built`, converted to the dtypes of `planned`."""
    dtypes = {name: tensor.dtype for name, tensor in planned.state_dict().items()}
    values = {name: tensor.to(dtypes[name]) for name, tensor in built.state_dict().items()}
    planned.load_state_dict(values, assign=True)
