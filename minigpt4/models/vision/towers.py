"""The vision tower that a `model` section names: one of VIT_MODELS, a transformers folder, or a timm model."""

from pathlib import Path
from typing import Any

from minigpt4.common.config import Problem
from minigpt4.common.utils import cached_path, expand_path, weights_problem
from minigpt4.models import weights
from minigpt4.models.llm.language_model import folder_problems
from minigpt4.models.vision.eva_vit import VIT_MODELS
from minigpt4.models.vision.timm_vit import TimmVit
from minigpt4.models.vision.tower import VisionTower
from minigpt4.models.vision.transformers_vit import TransformersVit


def name_of(cfg: Any) -> str:
    """Return the name of the tower of a `model` section: `vision_model`, or else the key of 2023, `vit_model`."""
    return cfg.vision_model or cfg.vit_model


def is_folder(cfg: Any) -> bool:
    """Whether the tower is a transformers folder; `vit_ckpt` is not read then."""
    name = name_of(cfg)
    return name not in VIT_MODELS and ("/" in name or expand_path(name).is_dir())


def unknown_tower(name: str) -> str:
    """Return the message about a name that no vision tower has."""
    return (
        f"'{name}' is no known vision tower: expected {', '.join(VIT_MODELS)}, or, as model.vision_model, a folder of "
        "transformers or the name of a plain ViT of timm"
    )


def tower_of(cfg: Any) -> VisionTower:
    """Return the tower of a `model` section, with dimensions from its files. Raises ValueError, CheckpointError."""
    name = name_of(cfg)
    if name in VIT_MODELS:
        return weights.dimensions(cached_path(cfg.vit_ckpt), VIT_MODELS[name], "model.vit_ckpt")
    return TransformersVit.of_folder(name) if is_folder(cfg) else _timm_tower(name)


def _timm_tower(name: str) -> TimmVit:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"model.vision_model: {unknown_tower(name)}")
    return TimmVit.of_name(name)


def weights_path(cfg: Any) -> Path:
    """Return the path of the tower's weights: a file, or the transformers folder."""
    return expand_path(cfg.vision_model) if is_folder(cfg) else cached_path(cfg.vit_ckpt)


def tower_problems(cfg: Any, where: str, standard_file: str) -> list[Problem]:
    """Return what is wrong with the tower's name and files; `standard_file` is the default of `vit_ckpt`, EVA's."""
    name = name_of(cfg)
    if cfg.vision_model and is_folder(cfg):
        expected = "give the folder with config.json, preprocessor_config.json (or processor_config.json) and weights"
        return [
            Problem(f"{where}.vision_model", message) for message in folder_problems(name, expected)
        ]
    if cfg.vision_model and name not in VIT_MODELS:
        try:
            _timm_tower(name)
        except ValueError as error:
            return [Problem.parse(error, where)]
        # the default file holds EVA's weights, not those of a timm model
        if cfg.vit_ckpt == standard_file:
            message = f"missing; {where}.vision_model {name} of timm needs its weight file"
            return [Problem(f"{where}.vit_ckpt", message)]
    return list(filter(None, [weights_problem(cfg.vit_ckpt, f"{where}.vit_ckpt")]))
