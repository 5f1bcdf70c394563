"""The frozen language model and its tokenizer, from a local transformers folder of any family."""

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

# Any model that has learned English finds this far from random; see `check_reads_english`.
SANITY_TEXT = (
    "The children walked to the beach in the morning. They built a castle of sand, and when the water came back in the "
    "afternoon, they sat on the old wall, ate bread and apples, and watched how the waves slowly took it away."
)
_EXPECTED = "give the folder with config.json, weights and tokenizer"
# Of everything read from a folder. Without it transformers asks on standard input whether to run code that lies there.
LOCAL = {"local_files_only": True, "trust_remote_code": False}


def folder_problems(folder: str | Path, expected: str = _EXPECTED) -> list[str]:
    """Return what is wrong with the files of a model's folder, as far as names, sizes and first bytes tell."""
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
    found = {path: placeholder(path, "a file of the model") for path in texts}
    if not any(found.values()):  # among them the index that names the weights
        try:
            weights = _weight_files(folder)
        except ValueError as error:
            return [str(error)]
        found |= {path: _weights_problem(path) for path in weights}
        if not weights:
            return [
                f"'{folder}' has no weights (model.safetensors or pytorch_model.bin, or shards); {expected}"
            ]
    return [f"'{path}' {problem}" for path, problem in found.items() if problem]


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of weights that transformers takes from a folder, by its index also those that are not there."""
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
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return "is not there, and the index beside it names it; copy all shards of the model there"
    if (found := not_weights(path)) or path.suffix != ".safetensors":
        return found
    try:
        with safe_open(path, "pt"):  # compares the header with the size
            return None
    except SafetensorError as error:
        return f"is damaged or cut off ({error}); copy it again"


@contextmanager
def _read_by_transformers(what: str, folder: str | Path) -> Iterator[None]:
    """Within the block any error becomes a ValueError of one line that names the key; a full memory stays one."""
    try:
        yield
    except Exception as error:  # of many kinds, from JSON to Rust
        if isinstance(
            error, (torch.OutOfMemoryError, MemoryError)
        ) or "can't allocate memory" in str(error):
            raise
        reason = f"{type(error).__name__}: {textwrap.shorten(str(error), 200, placeholder=' ..')}"
        if "trust_remote_code" in str(error):
            reason = "it needs code that lies in the folder (auto_map), and such code is never run"
        advice = "give a folder of a family that transformers knows, with config.json, weights and tokenizer"
        raise ValueError(
            f"model.llama_model: transformers cannot read {what} of '{folder}' ({reason}); {advice}"
        ) from error


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a folder; it pads on the right with its end token, as 2023. Raises ValueError."""
    from transformers import AutoTokenizer

    with _read_by_transformers("the tokenizer", folder):
        tokenizer = AutoTokenizer.from_pretrained(expand_path(folder), **LOCAL)
        # of a folder without the file transformers makes a tokenizer without words
        if not set(tokenizer("a", add_special_tokens=False).input_ids) - {tokenizer.unk_token_id}:
            raise ValueError("it knows no words; is tokenizer.json or tokenizer.model there?")
    _repair_end_tokens(tokenizer, folder)
    _use_sentencepiece_rules(tokenizer)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    return tokenizer


def _repair_end_tokens(tokenizer: "PreTrainedTokenizerBase", folder: str | Path) -> None:
    """Take BOS and EOS from config.json where the tokenizer names none, as in old conversions of LLaMA.

    BOS only if the tokenizer begins texts with it: config.json of Qwen names one that no text of its training has.
    Raises ValueError if there is no end token in either; a family without BOS starts its sequences without.
    """
    config = load_config(folder)
    begin = tokenizer("a").input_ids[0]
    for role in ("bos", "eos"):
        index = getattr(config, f"{role}_token_id", None)
        index = index[0] if isinstance(index, list) else index
        is_used = index is not None and (role == "eos" or index == begin)
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
    """Make a LLaMA tokenizer split text as sentencepiece does; others are left as they are.

    transformers 5 does not mark the start of a text that begins with a space, and keeps the spaces
    around special tokens. sentencepiece, so 2023 and the LLM's own training, marks every stretch of
    text, and a special token swallows the spaces beside it.
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

    `kind`: one of quantization.KINDS; quantised weights lie, on a machine with GPUs, on number
    `gpu`. `device_map`: they are spread over all devices, see accelerate. `shard`: called by all
    ranks, each gets its share. Raises ValueError if the files cannot be read or lack tensors that the
    configuration asks for, or the device cannot compute with weights of that kind.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {
        **LOCAL,
        "dtype": dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    options |= attention_options(device)
    # where the weights lie, and what packs them
    if kind != "none" and device.type == "cuda" and not shard:
        device = torch.device(f"cuda:{gpu}" if str(gpu).isdigit() else gpu)
    quantization.check_device(kind, device)
    if kind == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    if device_map != "none":
        options["device_map"] = device_map
    elif not shard and (kind == "nf4" or (kind == "none" and device.type != "cpu")):
        options["device_map"] = {"": device}
    with _read_by_transformers("the weights", folder):
        llm, info = AutoModelForCausalLM.from_pretrained(expand_path(folder), **options)
    # transformers would fill what is missing or of another shape with random numbers
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
    if shard:
        sharding.shard(llm, kind, device)
    elif kind not in ("none", "nf4"):
        llm = quantization.quantise(llm, kind, device)
    quantization.refuse_training(llm, kind, device)
    return llm.eval()


def attention_options(device: torch.device) -> dict[str, str]:
    """Return the options with which transformers builds an LLM that attends fast on `device`."""
    # in bfloat16 on a CPU up to 1.7 times faster than the fused kernel
    return {"attn_implementation": "eager"} if device.type == "cpu" else {}


def meta_llm(folder: str | Path, dtype: torch.dtype, kind: str = "none") -> "PreTrainedModel":
    """Return what `load_llm` would, on the meta device: shapes and types, no weights."""
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    with torch.device("meta"), _read_by_transformers("config.json", folder):
        llm = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return llm if kind == "none" else quantization.quantise_meta(llm, kind)


def identity(folder: str | Path, llm: nn.Module) -> dict[str, Any]:
    """Return {"name", "width", "vocabulary", "fingerprint"} of the LLM of a folder."""
    vocabulary, width = llm.get_input_embeddings().weight.shape
    name = expand_path(folder).resolve().name
    return {
        "name": name,
        "width": width,
        "vocabulary": vocabulary,
        "fingerprint": fingerprint(folder),
    }


@torch.no_grad()
def check_reads_english(
    llm: nn.Module, tokenizer: "PreTrainedTokenizerBase", folder: str | Path
) -> None:
    """Raise ValueError if the LLM predicts a plain English text little better than by guessing."""
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
