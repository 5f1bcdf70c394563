"""Open a checkpoint for export: its configuration, and its model with every tensor in the dtype of its file."""

import shutil
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from minigpt4.common.checkpoint import CheckpointError
from minigpt4.common.checkpoint_folder import CONFIG, is_checkpoint_folder, with_option
from minigpt4.common.config import Config
from minigpt4.common.own_code import shipped_imports
from minigpt4.common.registry import registry
from minigpt4.common.utils import FOLDER_MANIFEST, FOLDER_WEIGHTS, resolve_file
from minigpt4.models import checkpoint_folder, trained_with, weights
from minigpt4.models.llm import adapters, language_model, quantization
from minigpt4.models.minigpt_base import MiniGPTBase
from minigpt4.models.training_parts import modes


def open_config(
    checkpoint: str, cfg_path: str | None = None, options: Sequence[str] = ()
) -> Config:
    """Return the Config of a checkpoint: that of `cfg_path`, else the one saved in the checkpoint folder or file.

    Raises ConfigError, CheckpointError (a file without a configuration needs `cfg_path`), OSError.
    """
    if cfg_path:
        return Config(
            Namespace(cfg_path=cfg_path, options=with_option(options, "model.ckpt", checkpoint))
        )
    if is_checkpoint_folder(checkpoint):
        return Config(Namespace(cfg_path=checkpoint, options=options))
    # The file of a training run holds its configuration, which is written to a YAML file for Config to read.
    saved = weights.read_file(resolve_file(checkpoint, "CHECKPOINT"), "CHECKPOINT")
    config = trained_with.mapping(trained_with.mapping(saved).get("config"))
    if not trained_with.mapping(config.get("model")).get("arch"):
        raise CheckpointError(
            f"CHECKPOINT: '{checkpoint}' does not say which model it is of; give --cfg-path YAML"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG
        config = {**config, "imports": shipped_imports(config.get("imports"), checkpoint)}
        path.write_text(checkpoint_folder.config_text(config), encoding="utf-8")
        return Config(
            Namespace(cfg_path=str(path), options=with_option(options, "model.ckpt", checkpoint))
        )


def check_exportable(section: Any) -> None:
    """Raise ValueError for a model that cannot be exported as it is configured."""
    kind = quantization.kind_of(section.llm_quantization, section.low_resource)
    if kind != "none":
        raise ValueError(
            f"model.llm_quantization: {kind}; an export holds the LLM's own weights, and programs that serve it "
            "quantise them in their way. Add --options model.low_resource=False model.llm_quantization=none"
        )


def open_model(cfg: Config) -> tuple[MiniGPTBase, Any]:
    """Return (the model on the CPU, what its checkpoint says of itself); LoRA is merged into the LLM, in float32.

    Raises ValueError, OSError, as `from_config`.
    """
    section = cfg.model_cfg
    check_exportable(section)
    model_class = registry.get_model_class(section.arch)
    model_class.settle(section)
    model = model_class(section, torch.float32)
    model.load_vision(section, torch.device("cpu"))
    model.llama_tokenizer = language_model.load_tokenizer(section.llama_model)
    dtype = llm_dtype(section)
    llm = language_model.load_llm(section.llama_model, dtype, torch.device("cpu"))
    model.attach_language(llm, "cpu")
    model.llm_identity = language_model.identity(section.llama_model, llm)
    # the trained weights, after a check that they belong to these frozen ones
    path = resolve_file(section.ckpt, "model.ckpt")
    saved = checkpoint_folder.compared(model.load_ckpt(path), path, section, model.identity())
    model.trained_text = trained_with.trained_text(saved) or model.trained_text
    if section.lora_r:
        adapters.merge(llm)
    return model.eval(), saved


def llm_weights(section: Any) -> weights.Tensors:
    """Return the LLM's weights in the checkpoint of a section, without the constants that those of 2023 have."""
    path = resolve_file(section.ckpt, "model.ckpt")
    return {
        name: tensor
        for name, tensor in weights.read_tensors(path, "model.ckpt", root="model").items()
        if name.startswith("llama_model.") and not name.endswith(".inv_freq")
    }


def llm_dtype(section: Any) -> torch.dtype | str:
    """Return the dtype to open the LLM in: "auto", that of its files, if this holds the checkpoint's weights of it."""
    found = {tensor.dtype for tensor in llm_weights(section).values()}
    own = language_model.load_config(section.llama_model).dtype
    is_enough = modes(section)["llm"] == "frozen" and found <= {own}
    return "auto" if is_enough else torch.float32


def open_skeleton(cfg: Config) -> tuple[MiniGPTBase, Any]:
    """Return what `open_model` does, but with the LLM's weights on the meta device: shapes only."""
    section = cfg.model_cfg
    model = registry.get_model_class(section.arch).skeleton(section, torch.float32)
    model.read_files(section)
    saved = weights.read_file(resolve_file(section.ckpt, "model.ckpt"), "model.ckpt")
    return model, saved


def write_checkpoint(
    cfg: Config, model: MiniGPTBase, saved: Any, folder: Path, license: str | None = None
) -> None:
    """Write the checkpoint folder of a model; `saved` is what its checkpoint says of itself.

    Of a checkpoint that is a folder already, the files that belong to it are copied; its configuration is that of `cfg`,
    to which --options may belong. Raises ValueError if `license` differs from that folder's licence.
    """
    section = cfg.model_cfg
    path = resolve_file(section.ckpt, "model.ckpt")
    if is_checkpoint_folder(section.ckpt):
        own = checkpoint_folder.read_manifest(path.parent, "CHECKPOINT").get("licence")
        if license not in (None, own):
            raise ValueError(
                f"--license {license}: the manifest of '{section.ckpt}' says {own}; change it there"
            )
        with checkpoint_folder.written_whole(folder) as scratch:
            known = (FOLDER_MANIFEST, FOLDER_WEIGHTS, *checkpoint_folder.RUN_CARDS)
            for file in filter(Path.is_file, map(path.parent.joinpath, known)):
                shutil.copyfile(file, scratch / file.name)
            text = checkpoint_folder.config_text(cfg.to_dict())
            (scratch / CONFIG).write_text(text, encoding="utf-8")
        return
    # Only the model's own parameters are written; a checkpoint file may hold more.
    found = adapters.in_release_names(weights.read_tensors(path, "model.ckpt", root="model"))
    names = {model.release_name(name) for name, _ in model.named_parameters()}
    tensors = {name: tensor for name, tensor in found.items() if name in names}
    checkpoint_folder.write_folder(
        folder, tensors, cfg.to_dict(), identity_of(saved, model), section, license, source=path
    )


def identity_of(saved: Any, model: MiniGPTBase) -> Mapping[str, Any]:
    """Return the identity of the model that a checkpoint was trained with, completed by that of `model`."""
    theirs, own = trained_with.saved_identity(saved), model.identity()
    return own | {key: value for key, value in theirs.items() if key in own}
