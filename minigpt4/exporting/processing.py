"""Tokenizer, chat template, image processor and stop ids of an export, which give our prompts in transformers."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4.common.image_format import ImageFormat
from minigpt4.text.templates import Template

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import LlavaProcessor, PreTrainedTokenizerBase, PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"
# fields of a Template that are variables of the Jinja template
_TEXTS = ("user", "assistant", "answer", "system", "around_system", "markers")
# texts that may precede a stop string, as its tokens can depend on them
_BEFORE_STOP = ("", "a", "a.", "a ", "a\n")


def with_image_token(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerFast":
    """Return a copy of our tokenizer with IMAGE_TOKEN added.

    It is a PreTrainedTokenizerFast made of the content of tokenizer.json, as the tokenizer class of the LLM's family
    could change its rules. Raises ValueError for a tokenizer that cannot be saved as tokenizer.json.
    """
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"model.llama_model: {type(tokenizer).__name__} cannot be saved as tokenizer.json; no export"
        )
    if IMAGE_TOKEN in tokenizer.get_vocab():
        raise ValueError(f"model.llama_model: its vocabulary has {IMAGE_TOKEN} already; no export")
    roles = {
        role: str(token)
        for role, token in tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }
    exported = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend.to_str()), **roles
    )
    exported.add_special_tokens(
        {"extra_special_tokens": [AddedToken(IMAGE_TOKEN, special=True, normalized=False)]},
        replace_extra_special_tokens=False,
    )
    exported.padding_side = "left"  # as generation in batches needs
    return exported


def stop_ids(tokenizer: "PreTrainedTokenizerBase", template: Template, known: Any) -> list[int]:
    """Return the ids that end an answer: EOS, `known` (from generation_config), and first tokens of stop strings."""
    ids = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
    special = {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special
    }
    for stop in template.stop:
        if stop in special:
            ids.add(special[stop])
            continue
        for before in _BEFORE_STOP:
            alone = tokenizer(before, add_special_tokens=False).input_ids
            joined = tokenizer(before + stop, add_special_tokens=False).input_ids
            # only where the stop string begins with a token of its own
            if len(joined) > len(alone) and joined[: len(alone)] == alone:
                ids.add(joined[len(alone)])
    return sorted(ids - {None})


def chat_template(template: Template, has_bos: bool) -> str:
    """Return chat_template.jinja with the texts of a Template; its prompts are the same as `Conversation`'s."""
    texts = {key: getattr(template, key) for key in _TEXTS} | {"bos": has_bos}
    head = [
        f"{{%- set {key} = {json.dumps(value, ensure_ascii=False)} -%}}"
        for key, value in texts.items()
    ]
    body = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    return "\n".join([*head, body])


def make_processor(
    tokenizer: "PreTrainedTokenizerFast",
    image: ImageFormat,
    num_image_tokens: int,
    template: Template,
) -> "LlavaProcessor":
    """Return the processor that inserts `num_image_tokens` for an image and preprocesses images as we do."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pixels = CLIPImageProcessorPil(
        size={"height": image.size, "width": image.size},
        resample=3,  # bicubic
        do_center_crop=False,
        image_mean=list(image.mean),
        image_std=list(image.std),
    )
    # The class computes the number of image tokens as patches + additional ones: declare one patch of the image's size.
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=image.size,
        num_additional_image_tokens=num_image_tokens - 1,
        vision_feature_select_strategy="full",
        chat_template=chat_template(template, tokenizer.bos_token is not None),
    )
