"""The backend `packed`: the LLM on packed rows, through the model of transformers.

Shapes: T positions of all rows together, N of them predict a target, H query heads, d head width, D LLM width,
V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from torch import Tensor, nn

from minigpt4.models.llm.attention import Segments, attend
from minigpt4.models.llm.recompute import recompute_layers

ATTENTION = "minigpt4_packed"  # our name among the attention functions of transformers
# attention options of transformers that change the result, and that `attend` does not support
_UNSUPPORTED = {"softcap", "s_aux", "position_bias", "head_mask", "indices"}


def _for_transformers(
    module, query, key, value, attention_mask, scaling, dropout=0.0, segments=None, **options
):
    """Call `attend` with the interface of transformers: [1, heads, T, d] in, [1, T, H, d] and no attention weights out."""
    unsupported = {name for name in _UNSUPPORTED if options.get(name) is not None}
    if unsupported or dropout or attention_mask is not None or segments is None:
        raise NotImplementedError(
            f"attention with {', '.join(unsupported) or 'dropout or a mask'} is not packed"
        )
    # under autocast the rotary embedding of an LLM in float32 returns queries and keys in float32, unlike the values
    by_position = [
        each[0].transpose(0, 1).to(value.dtype).contiguous() for each in (query, key, value)
    ]
    return attend(*by_position, segments, scaling, options.get("sliding_window"))[None], None


@contextmanager
def packed_attention(llm: nn.Module) -> Iterator[None]:
    """Within the block a model of transformers attends by segments; its calls have to pass `segments`.

    The configuration is set directly: `set_attn_implementation` visits all modules, which is too slow for every
    recomputed layer.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _for_transformers)
    config = llm.config.get_text_config()
    original = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = original


def label_logits(
    llm: nn.Module,
    embeds: Tensor,
    positions: Tensor,
    segments: Segments,
    predicting: Tensor,
    recompute: bool = False,
) -> Tensor:
    """Return the logits [N, V] at the positions `predicting` [N] of packed embeddings [T, D]."""
    attention = partial(packed_attention, llm)
    with attention(), recompute_layers(llm, attention) if recompute else nullcontext():
        return llm(
            inputs_embeds=embeds[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=predicting,
            segments=segments,
        ).logits[0]
