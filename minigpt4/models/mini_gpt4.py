"""MiniGPT-4: a ViT, a bridge (Q-Former as in 2023, merged patches, or none), a projection, an LLM.

Shapes: I images, S image size, Dv ViT width, Q vectors per image, H their width, D LLM width.
"""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from minigpt4.common.dist_utils import main_print
from minigpt4.common.image_format import ImageFormat
from minigpt4.common.registry import registry
from minigpt4.common.startup import startup
from minigpt4.common.utils import cached_path, expand_path, resolve_file
from minigpt4.models import trained_with, weights
from minigpt4.models.mini_gpt4_config import NEW, MiniGPT4Config, bridge_of
from minigpt4.models.minigpt_base import MiniGPTBase
from minigpt4.models.vision import merging, towers
from minigpt4.models.vision.eva_vit import VIT_MODELS, compile_blocks, half_linears
from minigpt4.models.vision.qformer import (
    QFormerConfig,
    build_qformer,
    from_release_name,
    new_qformer,
    to_release_name,
)
from minigpt4.models.vision.tower import VisionTower


@registry.register_model("mini_gpt4")
@registry.register_model("minigpt4")  # its name in later YAML files, VLMEvalKit's among them
class MiniGPT4(MiniGPTBase):
    """ViT -> ln_vision -> bridge (Q-Former, merged patches or plain patches) -> llama_proj -> LLM."""

    PRETRAINED_MODEL_CONFIG_DICT = {
        "pretrain_vicuna": "configs/models/minigpt4.yaml",
        "pretrain_vicuna_7b": "configs/models/minigpt4.yaml",
        # names of the newest release
        "pretrain_vicuna0": "configs/models/minigpt4_vicuna0.yaml",
        "pretrain_llama2": "configs/models/minigpt4_llama2.yaml",
    }

    def __init__(self, cfg: MiniGPT4Config, compute_dtype: torch.dtype):
        super().__init__(cfg, compute_dtype)
        tower = self.tower(cfg)
        self.image_size, self.num_prefix = cfg.image_size or tower.image_size, tower.num_prefix
        self.pixels = ImageFormat(self.image_size, tower.mean, tower.std)
        self.tower_name = tower.family if towers.is_folder(cfg) else towers.name_of(cfg)
        self.bridge = bridge_of(cfg)
        self.visual_encoder = tower.build(self.image_size, cfg.drop_path_rate)
        self.visual_encoder.set_grad_checkpointing(cfg.use_grad_checkpoint)
        self.ln_vision = LayerNorm(tower.width, device="meta")
        if self.bridge == "qformer":
            self.add_qformer(cfg, tower)
        else:
            self.Qformer = self.query_tokens = None
            self.bridge_shape = merging.bridge_shape(tower, self.image_size, self.bridge)
        if self.train_modes["vision"] == "frozen":
            if cfg.vit_precision == "fp16":
                half_linears(self.visual_encoder, compute_dtype)
            self.freeze("visual_encoder", "ln_vision")

    def add_qformer(self, cfg: MiniGPT4Config, tower: VisionTower) -> None:
        """Create the Q-Former and its queries. Raises ValueError if its input width is not the tower's width."""
        standard = QFormerConfig()
        self.has_new_bridge = cfg.q_former_model == NEW
        if self.has_new_bridge:
            qformer = replace(standard, encoder_width=tower.width)
        else:
            qformer = weights.dimensions(
                cached_path(cfg.q_former_model), standard, "model.q_former_model"
            )
        if qformer.encoder_width != tower.width:
            raise ValueError(
                f"model.q_former_model: its Q-Former looks at {qformer.encoder_width}-wide image tokens, the "
                f"ViT of model.{tower.source} makes {tower.width}-wide ones; take files that belong together, or train "
                f"a new one: model.q_former_model={NEW} model.train.bridge=full"
            )
        self.Qformer = build_qformer(qformer)
        self.query_tokens = nn.Parameter(
            torch.empty(1, cfg.num_query_token, qformer.hidden_size, device="meta")
        )
        self.bridge_shape = cfg.num_query_token, qformer.hidden_size
        if self.train_modes["bridge"] == "frozen":
            self.freeze("Qformer", "query_tokens")

    @staticmethod
    def tower(cfg: MiniGPT4Config) -> VisionTower:
        """Return the vision tower of a `model` section, with the dimensions of its weight file."""
        return towers.tower_of(cfg)

    @classmethod
    def image_format(cls, cfg: MiniGPT4Config) -> ImageFormat | None:
        if not cfg.vision_model and cfg.vit_model not in VIT_MODELS:  # preflight reports it
            return None
        tower = cls.tower(cfg)
        return ImageFormat(cfg.image_size or tower.image_size, tower.mean, tower.std)

    @classmethod
    def image_tokens(cls, cfg: MiniGPT4Config) -> int:
        if bridge_of(cfg) == "qformer":
            return cfg.num_query_token
        tower = cls.tower(cfg)
        return merging.bridge_shape(tower, cfg.image_size or tower.image_size, bridge_of(cfg))[0]

    @property
    def num_image_tokens(self) -> int:
        return self.bridge_shape[0]

    @property
    def vision_width(self) -> int:
        return self.bridge_shape[1]

    def vision_composition(self) -> dict[str, str]:
        return {"vision": self.tower_name, "bridge": self.bridge}

    def release_name(self, name: str) -> str:
        return super().release_name(to_release_name(name))

    @staticmethod
    def import_libraries() -> None:
        import timm.models.eva  # noqa: F401
        from transformers import AutoModelForCausalLM, Blip2QFormerModel  # noqa: F401

    @classmethod
    def weight_files(cls, cfg: MiniGPT4Config) -> list[Path]:
        files = [towers.weights_path(cfg)]
        reads_qformer = bridge_of(cfg) == "qformer" and cfg.q_former_model != NEW
        if reads_qformer and cfg.q_former_model:
            files.append(cached_path(cfg.q_former_model))
        if cfg.ckpt:
            files.append(cached_path(cfg.ckpt))
        return [*files, expand_path(cfg.llama_model)]

    def load_vision(self, cfg: MiniGPT4Config, device: torch.device) -> None:
        main_print("Loading VIT")
        self.load_vit(cfg)
        if cfg.compile:
            compile_blocks(self.visual_encoder, device)
        main_print("Loading VIT Done")
        if self.bridge != "qformer":
            main_print("Do not use Q-Former here.")
            self.reset_ln_vision()
            return
        if cfg.q_former_model == NEW:
            main_print("A new Q-Former")
            self.reset_ln_vision()
            self.Qformer, self.query_tokens = new_qformer(self.Qformer, self.query_tokens)
            return
        main_print("Loading Q-Former")
        self.load_qformer(cfg)
        main_print("Loading Q-Former Done")

    def read_files(self, cfg: MiniGPT4Config) -> None:
        if towers.weights_path(cfg).exists():  # otherwise it has yet to be downloaded
            self.load_vit(cfg)
        if self.bridge == "qformer" and cached_path(cfg.q_former_model).is_file():
            self.load_qformer(cfg)
        super().read_files(cfg)

    @startup.phase("ViT")
    def load_vit(self, cfg: MiniGPT4Config) -> None:
        """Load the ViT's weights from `model.vit_ckpt` or `model.vision_model`. Raises CheckpointError, OSError."""
        tower, is_frozen = self.tower(cfg), self.train_modes["vision"] == "frozen"
        path, where = towers.weights_path(cfg), f"model.{tower.source}"
        hint = f"Expected {self.tower_name} of transformers"
        if tower.source == "vit_ckpt":
            path = resolve_file(cfg.vit_ckpt, where)
            hint = f"Expected the ViT {self.tower_name}"
            if self.tower_name in VIT_MODELS:
                hint += f" of the 2023 release, or dimensions in '{path.with_suffix('.json')}'"
        tower.load(self.visual_encoder, path, where, hint)
        if is_frozen:
            self.vision_identity[tower.source] = trained_with.identity(path)
        if cfg.vit_precision == "fp16" and (self.compute_dtype == torch.float32 or not is_frozen):
            reason = "this run does not compute in half precision" if is_frozen else "it trains"
            logging.info("vision encoder in float32: %s", reason)
        if is_frozen:
            logging.info("freeze vision encoder")

    @startup.phase("Q-Former")
    def load_qformer(self, cfg: MiniGPT4Config) -> None:
        """Load Q-Former, queries and ln_vision from `model.q_former_model`. Raises CheckpointError, OSError."""
        path = resolve_file(cfg.q_former_model, "model.q_former_model")
        found = weights.read_tensors(path, "model.q_former_model", root="model")
        expected = {
            to_release_name(name): tensor
            for name, tensor in self.state_dict().items()
            if name.startswith(("query_tokens", "ln_vision.", "Qformer."))
        }
        hint = f"Expected the file of BLIP-2, or its dimensions in '{path.with_suffix('.json')}'"
        found = weights.match(
            found, expected, "model.q_former_model", path, weights.QFORMER_EXCESS, hint=hint
        )
        weights.check_finite(found, "model.q_former_model", path)
        weights.assign(self, {from_release_name(name): tensor for name, tensor in found.items()})
        is_frozen = self.train_modes["bridge"] == "frozen"
        if is_frozen:
            self.vision_identity["q_former_model"] = trained_with.identity(path)
        logging.info("load checkpoint from %s", path)
        if is_frozen:
            logging.info("freeze Qformer")

    def reset_ln_vision(self) -> None:
        """Set ln_vision to weight 1 and bias 0: without a Q-Former file, no file holds its weights.

        Source: the newest release, whose projections were trained on the output of such a layer.
        """
        self.ln_vision.to_empty(device="cpu").reset_parameters()

    def encode_images(self, image: torch.Tensor) -> torch.Tensor:
        """Return the vectors [I, Q, D] of normalised images [I, 3, S, S]. Raises ValueError for other images."""
        if not image.is_floating_point():
            raise ValueError(
                f"image: {image.dtype}; expected normalised images: a loader's batch becomes that in "
                "minigpt4.common.device.to_device(batch, device)"
            )
        if image.ndim != 4 or image.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"image: {list(image.shape)}; expected [B, 3, {self.image_size}, {self.image_size}]: the processors' "
                "image_size must be model.image_size"
            )
        image = image.to(self.device)
        with self.maybe_autocast():
            # in a training step the vision side is replayed as a CUDA graph: with a recorder it is frozen
            if self.recorder and torch.is_grad_enabled():
                return self.llama_proj(self.recorder("vision", self._vectors, image))
            return self.llama_proj(self._vectors(image))

    def _vectors(self, image: torch.Tensor) -> torch.Tensor:
        """Return the vectors [I, Q, H] of images, before the projection."""
        image_embeds = self.ln_vision(self.visual_encoder(image))  # [I, prefix + patches, Dv]
        if self.Qformer is None:
            return merging.join_patches(image_embeds, self.num_prefix, self.bridge)
        return self.Qformer(self.query_tokens, image_embeds)


class LayerNorm(nn.LayerNorm):
    """Layer norm computed in float32 whatever the input's type, and returned in that type. Source: BLIP-2."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)
