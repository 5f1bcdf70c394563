"""The language model and its tokenizer, from a local transformers folder of any family."""

import json
import logging
import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from minigpt4.common.utils import expand_path, fingerprint, not_weights, placeholder
from minigpt4.models.llm import quantization, sharding

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# A model that has learned English predicts this far better than chance; see `check_reads_english`.
SANITY_TEXT = (
    "The children walked to the beach in the morning. They built a castle of sand, and when the water came back in the "
    "afternoon, they sat on the old wall, ate bread and apples, and watched how the waves slowly took it away."
)
_EXPECTED = "give the folder with config.json, weights and tokenizer"
# For everything that transformers reads from a folder: by default it asks on standard input whether to run code in there.
LOCAL = {"local_files_only": True, "trust_remote_code": False}


def folder_problems(folder: str | Path, expected: str = _EXPECTED) -> list[str]:
    """Return what is wrong with the files of a model's folder, judged by their names, sizes and first bytes."""
    try:
        return _folder_problems(expand_path(folder), expected)
    except OSError as error:
        return [f"'{error.filename}' cannot be read ({error.strerror})"]


def _folder_problems(folder: Path, expected: str) -> list[str]:
    if not (folder / "config.json").is_file():
        return [f"no transformers model in '{folder}' (config.json is not there); {expected}"]
    texts = sorted(
        path for path in folder.iterdir() if path.suffix in (".json", ".model") and path.is_file()
    )
    problems = {path: placeholder(path, "a file of the model") for path in texts}
    if not any(problems.values()):  # the index of the weight files is one of these texts
        try:
            weights = _weight_files(folder)
        except ValueError as error:
            return [str(error)]
        problems |= {path: _weights_problem(path) for path in weights}
        if not weights:
            return [
                f"'{folder}' has no weights (model.safetensors or pytorch_model.bin, or shards); {expected}"
            ]
    return [f"'{path}' {problem}" for path, problem in problems.items() if problem]


def _weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers reads from a folder, including missing shards that its index names.

    Raises ValueError for an index that does not name them.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            try:
                shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                return [folder / shard for shard in sorted(set(shards))]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"'{index}' does not say where the weights are ({error}); copy it again"
                ) from error
    return []


def _weights_problem(path: Path) -> str | None:
    """Return what is wrong with a weight file, as the end of a sentence that names it; None if nothing is."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return "is not there, and the index beside it names it; copy all shards of the model there"
    if (found := not_weights(path)) or path.suffix != ".safetensors":
        return found
    try:
        with safe_open(path, "pt"):  # checks that the header agrees with the file's size
            return None
    except SafetensorError as error:
        return f"is damaged or cut off ({error}); copy it again"


@contextmanager
def _read_by_transformers(what: str, folder: str | Path) -> Iterator[None]:
    """Within the block any error becomes a one-line ValueError that names the key, except running out of memory."""
    try:
        yield
    except Exception as error:  # of many types, from JSON's to those of Rust libraries
        is_out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if is_out_of_memory or "can't allocate memory" in str(error):
            raise
        reason = f"{type(error).__name__}: {textwrap.shorten(str(error), 200, placeholder=' ..')}"
        if "trust_remote_code" in str(error):
            reason = "it needs code that lies in the folder (auto_map), and such code is never run"
        advice = "give a folder of a family that transformers knows, with config.json, weights and tokenizer"
        raise ValueError(
            f"model.llama_model: transformers cannot read {what} of '{folder}' ({reason}); {advice}"
        ) from error


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a folder; it pads on the right with its end token, as in 2023. Raises ValueError."""
    from transformers import AutoTokenizer

    with _read_by_transformers("the tokenizer", folder):
        tokenizer = AutoTokenizer.from_pretrained(expand_path(folder), **LOCAL)
        # without a tokenizer file transformers returns a tokenizer with an empty vocabulary
        if not set(tokenizer("a", add_special_tokens=False).input_ids) - {tokenizer.unk_token_id}:
            raise ValueError("it knows no words; is tokenizer.json or tokenizer.model there?")
    _repair_end_tokens(tokenizer, folder)
    _use_sentencepiece_rules(tokenizer)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    return tokenizer


def _repair_end_tokens(tokenizer: "PreTrainedTokenizerBase", folder: str | Path) -> None:
    """Take BOS and EOS from config.json where the tokenizer names none, as in old conversions of LLaMA.

    BOS is taken only if the tokenizer puts it before texts: the config.json of Qwen names a BOS that its training never
    used. An LLM may have no BOS. Raises ValueError if neither names an end token.
    """
    config = load_config(folder)
    first_id = tokenizer("a").input_ids[0]
    for role in ("bos", "eos"):
        index = getattr(config, f"{role}_token_id", None)
        index = index[0] if isinstance(index, list) else index
        is_used = index is not None and (role == "eos" or index == first_id)
        if is_used and not getattr(tokenizer, f"{role}_token"):
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(index))
            logging.info(
                "model.llama_model: the tokenizer names no %s token, config.json does: id %d",
                role,
                index,
            )
    if not tokenizer.eos_token:
        raise ValueError(
            f"model.llama_model: neither tokenizer nor config.json of '{folder}' names an end token (eos)"
        )


def _use_sentencepiece_rules(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Make a LLaMA tokenizer split text as sentencepiece does; other tokenizers are not changed.

    transformers 5 adds no start-of-word mark to a text that begins with a space, and keeps the spaces around special
    tokens. sentencepiece, used in 2023 and in the LLM's own training, marks the start of every piece of text between
    special tokens, and drops the spaces next to them.
    """
    from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_sentencepiece = isinstance(getattr(backend, "pre_tokenizer", None), pre_tokenizers.Metaspace)
    if not (is_sentencepiece and getattr(backend.model, "byte_fallback", False)):
        return
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([])
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    strip = {"lstrip": True, "rstrip": True, "normalized": False, "special": True}
    backend.add_special_tokens([AddedToken(name, **strip) for name in special])
    # a new normalizer makes the backend forget the special tokens; read back, it knows them
    tokenizer._tokenizer = Tokenizer.from_str(backend.to_str())


def trains(llm: nn.Module) -> bool:
    """Whether any weight of the LLM trains; it is frozen otherwise."""
    return any(parameter.requires_grad for parameter in llm.parameters())


def load_config(folder: str | Path) -> "PreTrainedConfig":
    """Return the configuration of a folder. Raises ValueError for an unknown or remote-code family."""
    from transformers import AutoConfig

    with _read_by_transformers("config.json", folder):
        return AutoConfig.from_pretrained(expand_path(folder), **LOCAL)


def load_llm(
    folder: str | Path,
    dtype: torch.dtype,
    device: torch.device,
    kind: str = "none",
    gpu: int | str = 0,
    device_map: str = "none",
    shard: bool = False,
) -> "PreTrainedModel":
    """Return the causal LM of a folder, in evaluation mode, its weights in `dtype` on `device`.

    `kind`: one of quantization.KINDS. `gpu`: where `device` is "cuda" without an index, the GPU of quantised weights.
    `device_map`: spread the weights over all devices, see accelerate. `shard`: called by all ranks, each of which gets
    its shard. Raises ValueError if the files cannot be read or lack tensors that config.json asks for, or if the device
    cannot compute with weights of this kind.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {
        **LOCAL,
        "dtype": dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    options |= attention_options(device)
    if kind != "none" and not shard:
        device = quantization.device_of(device, gpu)
    quantization.check_device(kind, device)
    if kind == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    # int8, int4 and shards are made part by part below, from weights that are loaded on the CPU
    if device_map != "none":
        options["device_map"] = device_map
    elif not shard and (kind == "nf4" or (kind == "none" and device.type != "cpu")):
        options["device_map"] = {"": device}
    with _read_by_transformers("the weights", folder):
        llm, info = AutoModelForCausalLM.from_pretrained(expand_path(folder), **options)
    _check_loaded(info, folder)
    if shard:
        sharding.shard(llm, kind, device)
    elif kind not in ("none", "nf4"):
        llm = quantization.quantise(llm, kind, device)
    quantization.refuse_training(llm, kind, device)
    return llm.eval()


def _check_loaded(info: dict[str, Any], folder: str | Path) -> None:
    """Raise ValueError for tensors that transformers has filled with random numbers: missing, or of another shape."""
    if wrong := sorted(info["mismatched_keys"]):
        first = "{} is {}, expected {}".format(wrong[0][0], *map(list, wrong[0][1:]))
        raise ValueError(
            f"model.llama_model: the weight files in '{folder}' are of another model than its config.json: "
            f"{len(wrong)} tensors are of another shape ({first}); copy both from one place"
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"model.llama_model: the weight files in '{folder}' lack {len(missing)} tensors that its config.json asks "
            f"for ({', '.join(missing[:3])}{', ..' if len(missing) > 3 else ''}); copy all shards of the model there"
        )
    if unused := sorted(info["unexpected_keys"]):
        logging.info(
            "model.llama_model: %d tensors are not used: %s", len(unused), ", ".join(unused[:3])
        )


def attention_options(device: torch.device) -> dict[str, str]:
    """Return the options for transformers that choose the fastest attention on `device`."""
    # on a CPU in bfloat16, eager attention is up to 1.7 times as fast as the fused kernel
    return {"attn_implementation": "eager"} if device.type == "cpu" else {}


def meta_llm(folder: str | Path, dtype: torch.dtype, kind: str = "none") -> "PreTrainedModel":
    """Return the LLM that `load_llm` would load, on the meta device: shapes and types, no values."""
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    with torch.device("meta"), _read_by_transformers("config.json", folder):
        llm = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return llm if kind == "none" else quantization.quantise_meta(llm, kind)


def identity(folder: str | Path, llm: nn.Module) -> dict[str, Any]:
    """Return {"name", "width", "vocabulary", "fingerprint"} of `llm`, loaded from `folder`."""
    vocabulary, width = llm.get_input_embeddings().weight.shape
    return {
        "name": expand_path(folder).resolve().name,
        "width": width,
        "vocabulary": vocabulary,
        "fingerprint": fingerprint(folder),
    }


@torch.no_grad()
def check_reads_english(
    llm: nn.Module, tokenizer: "PreTrainedTokenizerBase", folder: str | Path
) -> None:
    """Raise ValueError if the LLM predicts a plain English text little better than chance."""
    embedding = llm.get_input_embeddings()
    ids = torch.tensor([tokenizer(SANITY_TEXT).input_ids], device=embedding.weight.device)
    logits = llm(input_ids=ids, use_cache=False).logits[0, :-1].float()
    loss = nn.functional.cross_entropy(logits, ids[0, 1:]).item()
    guess = math.log(logits.shape[-1])
    if not loss < 0.8 * guess:
        raise ValueError(
            f"model.llama_model: '{folder}' does not read English: loss {loss:.2f} a token on a plain paragraph; "
            f"guessing among {logits.shape[-1]} tokens has {guess:.2f} (10.375 in logs of LLaMA is such a guess). "
            "Most likely: a Vicuna delta that was not merged into LLaMA, wrong or half-copied weights, or a conversion "
            "gone wrong. To use it knowingly: --options model.check_llm=False"
        )
