"""Tokenizer, chat template, image processor and stop ids of an export: our prompts, by transformers' means."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4.common.image_format import ImageFormat
from minigpt4.text.templates import Template

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import LlavaProcessor, PreTrainedTokenizerBase, PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"
# of a Template, in the Jinja template
_TEXTS = ("user", "assistant", "answer", "system", "around_system", "markers")
# A stop string is tokenised by what stands before it.
_BEFORE = ("", "a", "a.", "a ", "a\n")


def with_image_token(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerFast":
    """Return a copy of our tokenizer, with its rules, that knows IMAGE_TOKEN.

    It is read back from tokenizer.json as it stands: a class of its family would make rules of its own. Raises
    ValueError for a tokenizer without such a file.
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
    exported.padding_side = "left"  # of a batch that is answered
    return exported


def stop_ids(tokenizer: "PreTrainedTokenizerBase", template: Template, known: Any) -> list[int]:
    """Return the ids that end an answer: end tokens, `known` (of generation_config), and those that begin a stop."""
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
        for before in _BEFORE:
            alone = tokenizer(before, add_special_tokens=False).input_ids
            joined = tokenizer(before + stop, add_special_tokens=False).input_ids
            if len(joined) > len(alone) and joined[: len(alone)] == alone:
                ids.add(joined[len(alone)])
    return sorted(ids - {None})


def chat_template(template: Template, has_bos: bool) -> str:
    """Return the Jinja template whose prompts are `Conversation`'s: chat_template.jinja with a format's texts."""
    texts = {key: getattr(template, key) for key in _TEXTS} | {"bos": has_bos}
    head = [
        f"{{%- set {key} = {json.dumps(value, ensure_ascii=False)} -%}}"
        for key, value in texts.items()
    ]
    return "\n".join(
        [*head, (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")]
    )


def make_processor(
    tokenizer: "PreTrainedTokenizerFast",
    image: ImageFormat,
    num_image_tokens: int,
    template: Template,
) -> "LlavaProcessor":
    """Return the processor that puts `num_image_tokens` in an image's place, and makes our pixels."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pixels = CLIPImageProcessorPil(
        size={"height": image.size, "width": image.size},
        resample=3,  # bicubic
        do_center_crop=False,
        image_mean=list(image.mean),
        image_std=list(image.std),
    )
    # it counts patches: one as large as the image, and the others
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=image.size,
        num_additional_image_tokens=num_image_tokens - 1,
        vision_feature_select_strategy="full",
        chat_template=chat_template(template, tokenizer.bos_token is not None),
    )
