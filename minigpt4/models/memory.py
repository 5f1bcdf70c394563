"""A training step without weights, values or a GPU: what it would hold in memory."""

from typing import NamedTuple

import torch

from minigpt4.common.memory import MemoryCounter, without_values
from minigpt4.models.base_model import resolve_compute_dtype
from minigpt4.models.llm import attention, quantization
from minigpt4.text.prompts import read_prompts
from minigpt4.text.segments import IMAGE_SLOT

CHARACTERS_A_TOKEN = 4  # of an English prompt


class Cost(NamedTuple):
    """What a step takes: bytes of weights, held between forward and backward, and at most; kernels started."""

    weights: int
    held: int
    peak: int
    launches: int


def count(model_class, cfg, device, batch_size, max_tokens=None):
    """Return the Cost of a step of a `model` section: `batch_size` texts of full length behind the longest prompt.

    `max_tokens`: as many are in the LLM at once. On a GPU the attention of GPUs of 2020 and later is counted. Raises
    ValueError for weights that cannot train.
    """
    kind = quantization.kind_of(cfg.llm_quantization, cfg.low_resource)
    if refusal := quantization.refusal_to_train(kind, device):
        raise ValueError(refusal)
    model = model_class.skeleton(cfg, resolve_compute_dtype(cfg.llm_precision, device)).train()
    model.llama_tokenizer = tokenizer_of_characters()
    if cfg.prompt_path:
        longest = max(read_prompts(cfg.prompt_path, cfg.prompt_template), key=len)
        before, after = (len(piece) // CHARACTERS_A_TOKEN for piece in longest.split(IMAGE_SLOT))
        model.prompt_list = ["a" * before + IMAGE_SLOT + "a" * after]
    samples = {"text_input": ["a" * cfg.max_txt_len] * batch_size}
    if max_tokens is not None:
        samples, _ = model.split(samples, max_tokens)[0]
    return count_step(model, samples, device, lambda batch: model(batch)["loss"])


def count_step(model, samples, device, loss):
    """Return the Cost of ``loss(samples)``, backward and AdamW; the model is on the meta device, images are added."""
    pictures = (len(samples["text_input"]), 3, model.image_size, model.image_size)
    with without_values(model), attention.as_on_gpu(device.type == "cuda"), MemoryCounter() as counter:
        counter.hold([*model.parameters(), *model.buffers()])
        weights = counter.now
        optimizer = _with_state([parameter for parameter in model.parameters() if parameter.requires_grad])
        samples = samples | {"image": torch.empty(pictures), "iters": 0}
        counter.launches = 0
        found = loss(samples)
        held = counter.now
        found.backward()
        optimizer.step()
    return Cost(weights, held, counter.peak, counter.launches)


def _with_state(parameters):
    """Return an AdamW that has its moments, as from the second step on."""
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def tokenizer_of_characters():
    """Return a tokenizer with a token for each printable ASCII character and the end of a line."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    symbols = ["<s>", "</s>", "\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    tokenizer.decoder = decoders.Fuse()
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    found.pad_token, found.padding_side = found.eos_token, "right"
    return found
