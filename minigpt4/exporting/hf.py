"""`--to hf`: a folder that transformers, and programs built on it, open without our code; and `--to gguf`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minigpt4.common.config import Config
from minigpt4.common.utils import FOLDER_MANIFEST, FOLDER_WEIGHTS, read_json
from minigpt4.exporting import processing
from minigpt4.exporting.card import model_card
from minigpt4.exporting.forms import form_of
from minigpt4.exporting.names import POSITIONS, why_lost
from minigpt4.exporting.opening import (
    check_exportable,
    llm_dtype,
    llm_weights,
    open_model,
    open_skeleton,
    write_checkpoint,
)
from minigpt4.models.base_model import DTYPES
from minigpt4.models.checkpoint_folder import written_whole
from minigpt4.models.llm import language_model
from minigpt4.models.minigpt_base import MiniGPTBase
from minigpt4.models.training_parts import modes
from minigpt4.text.templates import Template, template_for

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import GenerationConfig

OWN = "minigpt4"  # the folder within an export that describes the original checkpoint
MAX_NEW_TOKENS = 300  # per answer, as in our chat; the default of transformers is 20


def export_hf(cfg: Config, folder: Path, license: str | None = None) -> str:
    """Write `folder` completely or not at all; return the name of the class that opens it.

    Raises FileExistsError if `folder` exists, ValueError for a model that no class can represent, and what `open_model`
    raises.
    """
    section = cfg.model_cfg
    form = form_of(section)
    check_exportable(section)
    with written_whole(folder) as scratch:
        model, saved = open_model(cfg)
        template = template_for(*model.trained_text)
        tokenizer = processing.with_image_token(model.llama_tokenizer)
        image_id = tokenizer.convert_tokens_to_ids(processing.IMAGE_TOKEN)
        # The checkpoint's manifest and configuration; the weights are in the export itself. This comes before
        # `make_room`, which changes the LLM.
        write_checkpoint(cfg, model, saved, scratch / OWN, license)
        (scratch / OWN / FOLDER_WEIGHTS).unlink()
        make_room(model, image_id)
        # The configuration is saved twice, as save_pretrained writes the dtype of the tensors, not that to compute in.
        exported = form.build(model, image_id)
        exported.generation_config = generation_settings(model, template, image_id)
        exported.save_pretrained(scratch)
        exported.config.dtype = dtype_of(section)
        exported.config.save_pretrained(scratch)
        image = type(model).image_format(section)
        processor = processing.make_processor(tokenizer, image, model.num_image_tokens, template)
        processor.save_pretrained(scratch)
        class_name = type(exported).__name__
        manifest = read_json(scratch / OWN / FOLDER_MANIFEST)
        is_resampled = model.image_size != type(model).tower(section).image_size
        tensors = manifest["weights"]["tensors"]
        lost = [name for name in tensors if is_resampled or POSITIONS not in name]
        card = model_card(class_name, template, manifest, model.repetition_penalty, why_lost(lost))
        (scratch / "README.md").write_text(card, encoding="utf-8")
    return class_name


def export_gguf(cfg: Config, folder: Path, license: str | None = None) -> Path:
    """Write `folder` with vision tower and projection, and the chat template, for llama.cpp; return the first file.

    Raises what `export_hf` raises.
    """
    from minigpt4.exporting.mmproj import check_gguf, write_gguf

    section = cfg.model_cfg
    check_exportable(section)
    if section.lora_r:
        raise ValueError(
            f"model.lora_r: {section.lora_r}; LoRA belongs to the LLM, whose GGUF is made elsewhere: export --to hf "
            "and convert the LLM of that"
        )
    if modes(section)["llm"] == "full":
        message = "the trained LLM goes into no projector file: export --to hf, and convert the LLM of that"
        raise ValueError(f"model.train.llm: full; {message}")
    if llm_weights(section):
        message = "holds weights of the LLM, which go into no projector file: export --to hf, and convert the LLM of that"
        raise ValueError(f"model.ckpt: '{section.ckpt}' {message}")
    # Check the model before the weights of the LLM are loaded.
    model, _ = open_skeleton(cfg)
    check_gguf(model)
    with written_whole(folder) as scratch:
        model, saved = open_model(cfg)
        write_gguf(model, type(model).image_format(section), scratch / "mmproj.gguf", folder.name)
        has_bos = model.llama_tokenizer.bos_token is not None
        text = processing.chat_template(template_for(*model.trained_text), has_bos)
        (scratch / "chat_template.jinja").write_text(text, encoding="utf-8")
        write_checkpoint(cfg, model, saved, scratch / OWN, license)
    return folder / "mmproj.gguf"


@torch.no_grad()
def make_room(model: MiniGPTBase, image_id: int) -> None:
    """Add an embedding row for the image token to the LLM, unless its table has an unused one.

    The row is the mean of all others, and so is its logit, so that greedy decoding never chooses the image token.
    """
    llm = model.llama_model
    size = len(llm.get_input_embeddings().weight)
    if image_id < size:
        return
    llm.resize_token_embeddings(image_id + 1, mean_resizing=False)
    for layer in (llm.get_input_embeddings(), llm.get_output_embeddings()):
        layer.weight[size:] = layer.weight[:size].float().mean(0).to(layer.weight.dtype)


def generation_settings(
    model: MiniGPTBase, template: Template, image_id: int
) -> "GenerationConfig":
    """Return the settings of `generate`: greedy, with the stop tokens and the repetition penalty of our chat."""
    from transformers import GenerationConfig

    tokenizer = model.llama_tokenizer
    known = getattr(model.llama_model.generation_config, "eos_token_id", None)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=processing.stop_ids(tokenizer, template, known),
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[image_id],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        repetition_penalty=model.repetition_penalty,
    )


def dtype_of(section: Any) -> str:
    """Return the dtype for other programs to compute in: `model.llm_precision`, or for "auto" that of the LLM's files."""
    if section.llm_precision in DTYPES:
        return str(DTYPES[section.llm_precision]).removeprefix("torch.")
    if llm_dtype(section) == torch.float32:
        return "float32"
    found = language_model.load_config(section.llama_model).dtype
    return str(found or torch.float32).removeprefix("torch.")
