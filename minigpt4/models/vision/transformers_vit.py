"""Vision towers from folders of transformers: CLIP, SigLIP, SigLIP 2, DINOv2. Penultimate features, as EVA-CLIP's.

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
from minigpt4.models import weights
from minigpt4.models.vision.tower import VisionTower, check_patches

# model_type of config.json (or of its vision_config) -> prefix tokens before the patches: class token, registers
FAMILIES = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "siglip2_vision_model": 0,
    "dinov2": 1,
    "dinov2_with_registers": 1,  # and num_register_tokens
}
# What a folder may hold in excess: the text side, and what stands behind the penultimate block.
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
_NORMS = ("post_layernorm", "layernorm")  # behind the last block


@dataclass(frozen=True)
class TransformersVit(VisionTower):
    """A folder with config.json, preprocessor_config.json and weights; made by `of_folder`."""

    folder: str
    family: str
    width: int
    depth: int  # of the folder; one block less is computed
    patch_size: int
    image_size: int
    num_prefix: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    source = "vision_model"

    @classmethod
    def of_folder(cls, folder: str | Path) -> "TransformersVit":
        """Return the tower of a folder, from its JSON files. Raises ValueError for one that is none of FAMILIES."""
        config = _read_json(folder, "config.json")
        config = config.get("vision_config") or config
        family = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}.get(
            *[config.get("model_type")] * 2
        )
        if family not in FAMILIES:
            raise ValueError(
                f"model.vision_model: '{folder}' holds a model of type {family!r}, which is no known vision tower; "
                f"give a folder of CLIP, SigLIP, SigLIP 2 or DINOv2 ({', '.join(FAMILIES)})"
            )
        whole = _vision_config(folder)
        mean, std = _normalisation(folder)
        size = getattr(whole, "image_size", None) or whole.patch_size * round(
            whole.num_patches**0.5
        )
        num_prefix = FAMILIES[family] + getattr(whole, "num_register_tokens", 0)
        numbers = (whole.hidden_size, whole.num_hidden_layers, whole.patch_size, size, num_prefix)
        return cls(str(folder), family, *numbers, mean, std)

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
        """See VisionTower; transformers reads the files, and what it would fill with random numbers is an error."""
        from transformers import AutoModel

        options = {
            "config": _vision_config(path, less=1),
            "local_files_only": True,
            "trust_remote_code": False,
        }
        options |= {
            "dtype": torch.float32,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,
        }
        try:
            with _quiet():
                loaded, info = AutoModel.from_pretrained(path, **options)
        except Exception as error:  # of many kinds, from JSON to Rust
            raise CheckpointError(
                f"{where}: transformers cannot read the weights of '{path}' ({error!s:.200})"
            ) from None
        _without_end(loaded)
        # names are transformers', shapes those of the folder's config.json
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
        _take_constants(network.model, loaded)


class PenultimateVit(nn.Module):
    """The tokens [B, prefix + N, D] that leave the last block but one of a tower of transformers, without a last norm.

    `interpolate`: the position embeddings are resampled to the image's size.
    """

    def __init__(self, tower: TransformersVit, interpolate: bool):
        super().__init__()
        from transformers import AutoModel

        self.model = AutoModel.from_config(
            _vision_config(tower.folder, less=1), dtype=torch.float32
        )
        _without_end(self.model)
        self.family, self.patch_size = tower.family, tower.patch_size
        self.options = (
            {"interpolate_pos_encoding": True} if interpolate and "dino" not in tower.family else {}
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return tokens [B, prefix + N, D] of normalised pixels [B, 3, S, S]."""
        if self.family == "siglip2_vision_model":
            model = getattr(self.model, "vision_model", self.model)
            embeddings = model.embeddings.patch_embedding(self._patches(pixels)) + self._positions(
                pixels
            )
            return model.encoder(inputs_embeds=embeddings).last_hidden_state
        return self.model(pixels, **self.options).last_hidden_state

    def _patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return SigLIP 2's patches [B, N, P * P * 3], row by row, colours last."""
        size = self.patch_size
        # [B, 3, rows, P, columns, P]
        patches = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        return patches.permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2)

    def _positions(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return SigLIP 2's position embeddings [N, D], resampled to the image as transformers does."""
        weight = getattr(
            self.model, "vision_model", self.model
        ).embeddings.position_embedding.weight
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
        """Recompute the blocks in backward, while the tower is in training mode."""
        if enable:
            name = "activation_checkpointing_enable"  # the later name
            enable_it = getattr(self.model, name, None) or self.model.gradient_checkpointing_enable
            enable_it({"use_reentrant": False})


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from listing the tensors that are left out on purpose; `load` looks at all of them."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_wanted(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(is_wanted)
    try:
        yield
    finally:
        logger.removeFilter(is_wanted)


def _without_end(model: nn.Module) -> None:
    """Take out the norm behind the last block, and DINOv2's token for masked patches: neither would train."""
    for part in list(model.modules()):
        if getattr(part, "mask_token", None) is not None:
            part.mask_token = None
        for name in _NORMS:
            if isinstance(getattr(part, name, None), nn.LayerNorm):
                setattr(part, name, nn.Identity())


def _take_constants(network: nn.Module, loaded: nn.Module) -> None:
    """Give a network the buffers that no file holds, such as the numbers of positions."""
    theirs = dict(loaded.named_modules())
    for where, part in network.named_modules():
        part._buffers.update(theirs[where]._buffers)


def _vision_config(folder: str | Path, less: int = 0) -> Any:
    """Return transformers' configuration of a folder's tower, of `less` blocks less, without head and mask token."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            expand_path(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of many kinds
        raise ValueError(
            f"model.vision_model: transformers cannot read config.json of '{folder}' ({error!s:.200})"
        ) from None
    config = getattr(config, "vision_config", config)
    config.num_hidden_layers -= less
    config.vision_use_head = config.use_mask_token = False
    return config


def _normalisation(folder: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and std of RGB that a folder's image processor has."""
    settings = _read_json(folder, "preprocessor_config.json")
    mean, std = (settings.get(f"image_{name}") for name in ("mean", "std"))
    if not (isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3):
        raise ValueError(
            f"model.vision_model: preprocessor_config.json in '{folder}' names no image_mean and image_std of three "
            "colours; copy it again"
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
            "config.json, preprocessor_config.json and weights"
        ) from None
    return found
