"""Vision towers from transformers folders: CLIP, SigLIP, SigLIP 2, DINOv2, of which the penultimate features are used.

Shapes: B images, S image size, P patch size, N patches, D width.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minigpt4.common.checkpoint import CheckpointError
from minigpt4.common.utils import expand_path
from minigpt4.models import trained_with, weights
from minigpt4.models.vision.tower import VisionTower, check_patches

# {model_type in config.json or its vision_config: prefix tokens before the patches, such as the class token}
FAMILIES = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "siglip2_vision_model": 0,
    "dinov2": 1,
    "dinov2_with_registers": 1,  # plus num_register_tokens
}
# Tensors that a folder may hold in excess, with the reason: those of the text side, and after the penultimate block.
_EXCESS = (
    (
        r"text_model\..+|text_projection\..+|visual_projection\..+|logit_(scale|bias)",
        "the text side",
    ),
    (
        r"(.+\.)?(post_layernorm|layernorm|head|classifier|pooler)\..+",
        "what stands behind the last block",
    ),
    (r"(.+\.)?(position_ids|mask_token)", "of no use here"),
)
_NORMS = ("post_layernorm", "layernorm")  # names of the norm after the last block


@dataclass(frozen=True)
class TransformersVit(VisionTower):
    """A folder with config.json, preprocessor_config.json (or processor_config.json) and weights; made by `of_folder`."""

    folder: str
    family: str
    width: int
    depth: int  # of the model in the folder; the last block is not computed
    patch_size: int
    image_size: int
    num_prefix: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    source = "vision_model"

    @classmethod
    def of_folder(cls, folder: str | Path) -> "TransformersVit":
        """Return the tower of a folder, from its JSON files. Raises ValueError for a family that is not in FAMILIES."""
        config = _read_json(folder, "config.json")
        config = config.get("vision_config") or config
        model_type = config.get("model_type")
        vision_types = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
        family = vision_types.get(model_type, model_type)
        if family not in FAMILIES:
            raise ValueError(
                f"model.vision_model: '{folder}' holds a model of type {family!r}, which is no known vision tower; "
                f"give a folder of CLIP, SigLIP, SigLIP 2 or DINOv2 ({', '.join(FAMILIES)})"
            )
        vision_config = _vision_config(folder)
        mean, std = _normalisation(folder)
        patch_size = vision_config.patch_size
        image_size = getattr(vision_config, "image_size", None)
        if not image_size:  # SigLIP 2 names the number of patches instead
            image_size = patch_size * round(vision_config.num_patches**0.5)
        return cls(
            folder=str(folder),
            family=family,
            width=vision_config.hidden_size,
            depth=vision_config.num_hidden_layers,
            patch_size=patch_size,
            image_size=image_size,
            num_prefix=FAMILIES[family] + getattr(vision_config, "num_register_tokens", 0),
            mean=mean,
            std=std,
        )

    def num_tokens(self, image_size: int) -> int:
        return self.num_prefix + (image_size // self.patch_size) ** 2

    def build(
        self, image_size: int, drop_path_rate: float = 0.0, device: str = "meta"
    ) -> nn.Module:
        """See VisionTower. Raises ValueError if patches do not tile the image, or for a drop path rate."""
        check_patches(image_size, self.patch_size)
        if drop_path_rate:
            raise ValueError(
                f"model.drop_path_rate: {drop_path_rate}; a tower of transformers has none, set it to 0"
            )
        with torch.device(device):
            return PenultimateVit(self, image_size != self.image_size)

    def load(self, network: nn.Module, path: Path, where: str, hint: str = "") -> None:
        """See VisionTower; transformers reads the files, and tensors that it fills with random numbers are an error."""
        from transformers import AutoModel

        options = {
            "config": _vision_config(path, num_left_out=1),
            "local_files_only": True,
            "trust_remote_code": False,
            "dtype": torch.float32,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }
        try:
            with _quiet():
                loaded, info = AutoModel.from_pretrained(path, **options)
        except Exception as error:  # of many types, from JSON's to those of Rust libraries
            raise CheckpointError(
                f"{where}: transformers cannot read the weights of '{path}' ({error!s:.200})"
            ) from None
        _remove_unused(loaded)
        # `match` compares only names here, so the tensors are empty; shapes are checked below
        last = rf"(.+\.)?layers?\.{self.depth - 1}\..+"
        excess = ((last, "the last block (the one before it is used)"), *_EXCESS)
        own = {name for name, _ in loaded.named_parameters()}
        missing = {name: torch.empty(0) for name in sorted(info["missing_keys"]) if name in own}
        found = {name: torch.empty(0) for name in sorted(info["unexpected_keys"])}
        weights.match(found, missing, where, path, excess, hint=hint)
        if wrong := sorted(info["mismatched_keys"]):
            first = "{} is {}, its config.json asks for {}".format(
                wrong[0][0], *map(list, wrong[0][1:])
            )
            raise CheckpointError(f"{where}: '{path}' does not fit: {first}")
        tensors = dict(loaded.state_dict())
        weights.check_finite(tensors, where, path)
        weights.assign(network.model, tensors)
        _copy_constants(network.model, loaded)


class PenultimateVit(nn.Module):
    """A vision model of transformers up to its penultimate block, without a final norm: tokens [B, prefix + N, D].

    `interpolate`: resample the position embeddings to the image's size.
    """

    def __init__(self, tower: TransformersVit, interpolate: bool):
        super().__init__()
        from transformers import AutoModel

        config = _vision_config(tower.folder, num_left_out=1)
        self.model = AutoModel.from_config(config, dtype=torch.float32)
        _remove_unused(self.model)
        self.family, self.patch_size = tower.family, tower.patch_size
        self.options = {}
        if interpolate and "dino" not in tower.family:  # DINOv2 always interpolates
            self.options["interpolate_pos_encoding"] = True

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return tokens [B, prefix + N, D] of normalised pixels [B, 3, S, S]."""
        if self.family != "siglip2_vision_model":
            return self.model(pixels, **self.options).last_hidden_state
        # transformers' SigLIP 2 takes patches, not images
        model = getattr(self.model, "vision_model", self.model)
        embeddings = model.embeddings.patch_embedding(self._patches(pixels))
        positions = self._positions(model.embeddings.position_embedding.weight, pixels)
        return model.encoder(inputs_embeds=embeddings + positions).last_hidden_state

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return SigLIP 2's patches [B, N, P * P * 3], row by row, colours last."""
        size = self.patch_size
        # [B, 3, rows, P, columns, P]
        patches = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        return patches.permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2)

    def _positions(self, weight: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Return SigLIP 2's position embeddings [N, D], `weight` resampled to the image as transformers does."""
        old, new = round(len(weight) ** 0.5), pixels.shape[-1] // self.patch_size
        if old == new:
            return weight
        grid = weight.unflatten(0, (old, old)).permute(2, 0, 1)[None].float()
        resized = nn.functional.interpolate(grid, (new, new), mode="bilinear", antialias=True)
        return resized[0].flatten(1).T.to(weight.dtype)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer's blocks."""
        return next(part for part in self.model.modules() if isinstance(part, nn.ModuleList))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in backward, while the tower is in training mode; `enable=False` does nothing."""
        if enable:
            name = "activation_checkpointing_enable"  # in later versions of transformers
            enable_it = getattr(self.model, name, None) or self.model.gradient_checkpointing_enable
            enable_it({"use_reentrant": False})


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from logging the tensors that are left out on purpose; `load` checks all of them."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_wanted(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_wanted)
    try:
        yield
    finally:
        logger.removeFilter(is_wanted)


def _remove_unused(model: nn.Module) -> None:
    """Remove the norm after the last block and DINOv2's mask token: unused, they would get no gradient."""
    for part in list(model.modules()):
        if getattr(part, "mask_token", None) is not None:
            part.mask_token = None
        for name in _NORMS:
            if isinstance(getattr(part, name, None), nn.LayerNorm):
                setattr(part, name, nn.Identity())


def _copy_constants(network: nn.Module, loaded: nn.Module) -> None:
    """Copy the buffers, among them those that no file holds, such as position ids."""
    theirs = dict(loaded.named_modules())
    for name, module in network.named_modules():
        module._buffers.update(theirs[name]._buffers)


def _vision_config(folder: str | Path, num_left_out: int = 0) -> Any:
    """Return transformers' configuration of a folder's vision model, without head, mask token and its last blocks.

    `num_left_out`: the number of these blocks. Raises ValueError if it cannot be read.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            expand_path(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of many types
        raise ValueError(
            f"model.vision_model: transformers cannot read config.json of '{folder}' ({error!s:.200})"
        ) from None
    config = getattr(config, "vision_config", config)
    config.num_hidden_layers -= num_left_out
    config.vision_use_head = config.use_mask_token = False
    return config


def _normalisation(folder: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and std of RGB of a folder's image processor. Raises ValueError if it names none."""
    name = "preprocessor_config.json"
    whole = "processor_config.json"  # of a whole processor: transformers 5 saves the image processor in it
    if not (expand_path(folder) / name).exists() and (expand_path(folder) / whole).exists():
        name = whole
    settings = _read_json(folder, name)
    if name == whole:
        settings = trained_with.mapping(settings.get("image_processor"))
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if not (isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3):
        raise ValueError(
            f"model.vision_model: {name} in '{folder}' names no image_mean and image_std of three colours; copy it again"
        )
    return tuple(map(float, mean)), tuple(map(float, std))


def _read_json(folder: str | Path, name: str) -> dict[str, Any]:
    path = expand_path(folder) / name
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"model.vision_model: '{path}' cannot be read ({error!s:.200}); give the whole folder of the model, with "
            "config.json, preprocessor_config.json (or processor_config.json) and weights"
        ) from None
    return found
