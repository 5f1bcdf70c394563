"""Rows: what the LLM reads and learns of each sample. The only place that knows token ids, labels and cutting.

    BOS <prompt, with image slots> <answer + end symbol> [<next question> <answer + end symbol> ..]

`batch_rows` makes the rows of training, validation and preview, `context_ids` the ids of a chat, from segments of one
form (a sample's are made in `sample_segments.py`), by one encoder, which begins both with BOS (`PromptEncoder.bos`).
How a batch of rows lies in memory, packed or padded, is the matter of `models/llm/layouts.py`. Nothing here needs more
than the tokenizer.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

from minigpt4.text.cutting import warn_of_cut_prompt
from minigpt4.text.encoder import PromptEncoder
from minigpt4.text.sample_segments import TextSettings, sample_segments
from minigpt4.text.segments import IMAGE, Segment, Text
from minigpt4.text.templates import Template

IMAGE_ID = -1  # stands in `Row.ids` in every place that a vision vector takes
IGNORED = -100  # label of a position that is not learnt


class Row(NamedTuple):
    """One sample as the LLM reads it.

    `ids`: token ids, with IMAGE_ID in every place of a vision vector. `labels`: the id where it is learnt, IGNORED
    elsewhere. `num_prompt`: leading positions before the first answer. `images`: which of the batch's images are its
    own, in the order of their places. `num_cut`: positions that were cut off.
    """

    ids: list[int]
    labels: list[int]
    num_prompt: int
    images: range
    num_cut: int

    @property
    def num_targets(self) -> int:
        """The number of positions that are learnt."""
        return sum(label != IGNORED for label in self.labels)


def batch_rows(
    samples: dict,
    prompt: str,
    settings: TextSettings,
    encoder: PromptEncoder,
    num_image_tokens: int,
) -> list[Row]:
    """Return the Row of each sample of a batch.

    `samples` has "text_input", a list of captions or answers, and may have, each a list of one entry a sample:
    "num_images" (one each if absent); "instruction", a text, '' for none; "turns", (question, answer) pairs, () for
    none. A question is a text, or a sequence of texts and IMAGE; images that no question places stand before the
    first one. Or it is Marked: a marked instruction is the whole prompt, unless `settings.chat_template` sets it into
    the template. `prompt` is the one drawn for this batch, for samples without instruction and turns.

    The prompt behind BOS is cut to `settings.max_context_len` positions, what follows it to `settings.max_txt_len`.
    Raises ValueError for questions without a prompt template, which alone can tell them from answers, and for more or
    fewer slots than images.
    """
    counts = image_counts(samples)
    segments = []
    for number, num_images in enumerate(counts):
        given = [key for key in ("text_input", "instruction", "turns") if samples.get(key)]
        sample = {key: samples[key][number] for key in given}
        segments.append(sample_segments(sample, prompt, num_images, settings))
    # the tokenizer takes all of them in one call; a sample's images stand behind those of the samples before it
    images = [range(*bounds) for bounds in pairwise(accumulate(counts, initial=0))]
    encoded = zip(encoder.encode_batch(segments), images, strict=True)
    return [_row(parts, own, num_image_tokens, settings, encoder) for parts, own in encoded]


@contextmanager
def faults_named(samples: dict, *arguments: Any) -> Iterator[None]:
    """Within the block, which calls `batch_rows` with these arguments, a sample's error is a ValueError with its id.

    One that each sample has by itself is no sample's fault, and stays as it is.
    """
    try:
        yield
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        number = len(samples["text_input"])
        faulty = {}
        for index in range(number):
            try:
                batch_rows(_part_of_batch(samples, index, index + 1), *arguments)
            except (TypeError, AttributeError, KeyError, ValueError) as fault:
                faulty[index] = fault
        if not faulty or (len(faulty) == number and isinstance(error, ValueError)):
            raise
        ids = samples.get("sample_id") or range(number)
        named = "; ".join(f"{ids[index]}: {fault!s:.200}" for index, fault in faulty.items())
        raise ValueError(
            f"the text of {len(faulty)} of the batch's {number} samples cannot be read ({named}). Correct or remove "
            "them, or let the dataset skip them: docs/custom_data.md"
        ) from error


def image_counts(samples: dict) -> list[int]:
    """Return the number of images of each sample of a batch."""
    counts = samples.get("num_images")
    return [1] * len(samples["text_input"]) if counts is None else list(counts)


def context_ids(
    segments: Sequence[Segment], encoder: PromptEncoder, image_sizes: Sequence[int]
) -> list[int]:
    """Return the ids of a dialogue that waits for its answer; the k-th image takes `image_sizes[k]` positions."""
    sizes = iter(image_sizes)
    ids = []
    for piece in encoder.encode(segments):
        ids += [IMAGE_ID] * next(sizes) if piece is IMAGE else piece
    return ids


def answer_row(
    segments: Sequence[Segment],
    answer: str,
    template: Template,
    encoder: PromptEncoder,
    image_sizes: Sequence[int],
    images: range,
) -> Row:
    """Return the Row of a dialogue that waits for its answer (see `context_ids`), with an answer and its end symbol.

    As in training the answer is tokenised by itself; it is never cut, and all of it is a target.
    """
    prompt = context_ids(segments, encoder, image_sizes)
    end = template.stop[0] if template.stop else ""
    target = [
        Text(template.neutralise(answer), is_target=True),
        Text(end, is_structure=True, is_target=True),
    ]
    ids = []
    for content, _ in encoder.encode_batch([target])[0]:
        ids += content
    return Row([*prompt, *ids], [IGNORED] * len(prompt) + ids, len(prompt), images, 0)


def _row(
    parts: list,
    images: range,
    num_image_tokens: int,
    settings: TextSettings,
    encoder: PromptEncoder,
) -> Row:
    """Return the Row of encoded parts, cut; a question whose answer is cut off goes too.

    What is left behind the prompt begins with an answer.
    """
    unlearnt = _unlearnt(settings, encoder)
    ids = list(encoder.bos)
    labels, is_target = [IGNORED] * len(ids), [False] * len(ids)
    for content, learns in parts:
        content = [IMAGE_ID] * num_image_tokens if content is IMAGE else content
        ids += content
        labels += [index if learns and index not in unlearnt else IGNORED for index in content]
        is_target += [learns] * len(content)
    if labels:
        labels[0] = IGNORED  # nothing comes before it that could predict it
    num_prompt = is_target.index(True) if any(is_target) else len(ids)
    # the prompt is cut at its end
    if (excess := num_prompt - len(encoder.bos) - settings.max_context_len) > 0:
        warn_of_cut_prompt(settings.max_context_len)
        if IMAGE_ID in ids[num_prompt - excess : num_prompt] and IMAGE_ID in ids[num_prompt:]:
            raise ValueError(
                "the first question is cut within or before an image, and a later one has another image"
            )
        for values in (ids, labels, is_target):
            del values[num_prompt - excess : num_prompt]
        num_prompt -= excess
    # cut to the limit, then back to the end of an answer
    end = min(len(ids), num_prompt + settings.max_txt_len)
    while end > num_prompt and not is_target[end - 1]:
        end -= 1
    num_kept = math.ceil(ids[:end].count(IMAGE_ID) / num_image_tokens)  # the last one may be cut
    return Row(ids[:end], labels[:end], num_prompt, images[:num_kept], len(ids) - end)


def _unlearnt(settings: TextSettings, encoder: PromptEncoder) -> set[int]:
    """Return the ids that are no target, wherever they stand: by `mask_eos_labels` the pad token, the end token."""
    return {encoder.tokenizer.pad_token_id} if settings.mask_eos_labels else set()


def end_problem(settings: TextSettings, encoder: PromptEncoder) -> str | None:
    """Return what is wrong with an end symbol of which no token would be learnt; None if the model learns to stop."""
    (end,) = encoder.encode_batch([[Text(settings.end_sym, is_structure=True)]])
    ids = set(chain.from_iterable(piece for piece, _ in end))
    if not ids:
        return "model.end_sym is empty: no end would be learnt, and the model would never stop. Set it to the end token"
    if not ids <= _unlearnt(settings, encoder):
        return None
    return (
        f"model.end_sym {settings.end_sym!r} is the end token, and would not be learnt: the model would never stop. "
        "Set model.mask_eos_labels=False (True is 2023's way, for an end_sym of other tokens)"
    )


def split_batch(samples: dict, rows: Sequence[Row], max_tokens: int) -> list[tuple[dict, float]]:
    """Return [(part of a batch, its share of all targets)] of parts with at most `max_tokens` positions.

    A sample that is longer stands alone; parts without a target are left out, unless the batch has none.
    """
    total = sum(row.num_targets for row in rows)
    if not total:
        return [(samples, 1)]
    starts, num_held = [0], 0
    for number, row in enumerate(rows):
        if num_held and num_held + len(row.ids) > max_tokens:
            starts.append(number)
            num_held = 0
        num_held += len(row.ids)
    parts = []
    for start, stop in pairwise([*starts, len(rows)]):
        share = sum(row.num_targets for row in rows[start:stop]) / total
        if share:
            parts.append((_part_of_batch(samples, start, stop), share))
    return parts


def _part_of_batch(samples: dict, start: int, stop: int) -> dict:
    counts = image_counts(samples)
    images = slice(sum(counts[:start]), sum(counts[:stop]))
    part = {}
    for key, value in samples.items():
        if value is None or isinstance(value, (int, float, str)):  # of the step, such as "iters"
            part[key] = value
        else:
            part[key] = value[images] if key == "image" else value[start:stop]
    return part
